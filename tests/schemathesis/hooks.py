"""Makes generated requests that are valid by themselves fit the machine as well, so that some get past the first check."""

import schemathesis
from schemathesis import GenerationMode

# The machine's devices, and keys that some of them can change.
DEVICES = ["disk0", "balloon0", "rng0", "vsock0"]
KEYS = ["bandwidth", "ops", "path", "size", "stats"]


@schemathesis.hook
def map_case(context, case):
    body, parameters = case.body, case.path_parameters
    if not (case.meta and case.meta.generation.mode == GenerationMode.POSITIVE and isinstance(body, dict)):
        return case
    body = dict(body)
    if case.method == "PATCH" and parameters:
        parameters["id"] = DEVICES[len(str(body)) % len(DEVICES)]
    for key in ("drive_id", "iface_id"):
        if key in body:
            body[key] = parameters["id"]
    for key in ("kernel_image_path", "initrd_path", "path_on_host"):
        # Files that are there and are not: half and half.
        if isinstance(body.get(key), str) and len(body[key]) % 2 == 0:
            body[key] = "disk"
    if case.path == "/vmm/v1/devices/{id}":
        body = {KEYS[(i + len(str(body))) % len(KEYS)]: value for i, value in enumerate(body.values())}
    if case.path == "/vmm/v1/snapshot":
        # The machine would end with it, and the test with the machine.
        body.pop("stop", None)
    case.body = body
    return case
