//! The control API through its socket: a guest's whole life by Firecracker's calls, refusals, clients that mean no good.
//! On this machine's /dev/kvm: what is tested here is the API and not the guest.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use harness::micro::Micro;
use harness::{Acceleration, Api, Kernel, local_kvm};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A directory with what a machine needs, and the program in it.
struct Setup {
    dir: TempDir,
}

impl Setup {
    /// Where no guest can run, this panics: a run of all tests leaves those of this file out then, and says so.
    fn new() -> Result<Self> {
        acceleration();
        let dir = tempfile::tempdir()?;
        // hlt for ever
        Micro::new().print("up\n").raw(&[0xf4, 0xeb, 0xfd]).write(&dir.path().join("kernel"))?;
        fs::write(dir.path().join("disk"), [7; 4096])?;
        Ok(Self { dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts the program under this name, with its working directory here.
    fn start_as(&self, program: &Path, arguments: &[&str]) -> Result<Program> {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.dir.path());
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        Ok(Program(Some(child)))
    }

    fn start(&self, arguments: &[&str]) -> Result<Program> {
        self.start_as(Path::new(env!("CARGO_BIN_EXE_vmm")), arguments)
    }

    /// `vmm api`, and its API.
    fn api(&self) -> Result<(Program, Api)> {
        let program = self.start(&["api", "--api-sock", "api.sock", "--id", "web"])?;
        Ok((program, Api::when_ready(&self.path("api.sock"))?))
    }

    /// Everything that a machine that does nothing takes.
    fn configure(&self, api: &Api) -> Result<()> {
        api.put("/boot-source", json!({"kernel_image_path": "kernel"}))?;
        api.put("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 16}))
    }
}

fn acceleration() -> Acceleration {
    local_kvm().expect("this needs a /dev/kvm on this machine")
}

/// A program that does not outlive its test.
struct Program(Option<Child>);

impl Program {
    fn pid(&self) -> Pid {
        Pid::from_child(self.0.as_ref().expect("it runs"))
    }

    fn wait(mut self) -> Result<Output> {
        Ok(self.0.take().expect("it runs").wait_with_output()?)
    }

    fn signal(self, signal: Signal) -> Result<Output> {
        kill_process(self.pid(), signal)?;
        self.wait()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            _ = child.kill();
            _ = child.wait();
        }
    }
}

#[test]
fn firecrackers_calls_are_a_guests_whole_life() -> Result<()> {
    let setup = Setup::new()?;
    let kernel = Kernel::ours(acceleration()).file()?;
    fs::copy(harness::demo_image()?, setup.path("root"))?;
    fs::write(setup.path("data"), vec![1; 1 << 20])?;
    fs::write(setup.path("other"), vec![2; 2 << 20])?;
    let (program, api) = setup.api()?;
    let info = api.get_json("/")?;
    assert_eq!((&info["id"], &info["state"]), (&json!("web"), &json!("Not started")));
    assert!(info["vmm_version"].is_string() && api.get_json("/version")?["firecracker_version"].is_string());

    let boot_args = "console=ttyS0 reboot=k panic=1 pci=off -- cat";
    api.put("/boot-source", json!({"kernel_image_path": kernel, "boot_args": boot_args}))?;
    let drive = |id: &str, path: &str, root: bool| json!({"drive_id": id, "path_on_host": path, "is_root_device": root, "is_read_only": root});
    api.put("/drives/data", drive("data", "data", false))?;
    api.put("/drives/rootfs", drive("rootfs", "root", true))?;
    api.put("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 128}))?;
    api.patch("/machine-config", json!({"mem_size_mib": 192}))?;
    api.put("/vsock", json!({"guest_cid": 3, "uds_path": "v.sock"}))?;
    api.put("/balloon", json!({"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1}))?;
    api.put("/entropy", json!({"rate_limiter": {"bandwidth": {"size": 65536, "refill_time": 100}}}))?;
    api.put("/serial", json!({"serial_out_path": "console"}))?;
    api.put(
        "/logger",
        json!({"log_path": "log", "level": "Info", "show_level": true, "show_log_origin": true}),
    )?;
    api.put("/metrics", json!({"metrics_path": "metrics"}))?;
    api.put("/actions", json!({"action_type": "InstanceStart"}))?;
    let reached = |what: &str| {
        let reached = |event: &Value| event["milestone"] == json!(what);
        api.follow("/vmm/v1/events").map(|mut events| events.any(|event| reached(&event)))
    };
    assert!(reached("user_space_reached")?);

    assert_eq!(api.get_json("/")?["state"], json!("Running"));
    let configuration = api.get_json("/vm/config")?;
    assert_eq!(configuration["machine-config"]["mem_size_mib"], json!(192));
    assert_eq!(configuration["drives"].as_array().map(Vec::len), Some(2));
    api.patch("/vm", json!({"state": "Paused"}))?;
    assert_eq!(api.get_json("/")?["state"], json!("Paused"));
    api.patch("/vm", json!({"state": "Paused"}))?;
    api.patch("/vm", json!({"state": "Resumed"}))?;

    let limiter = json!({"bandwidth": {"size": 1 << 20, "refill_time": 100}});
    api.patch("/drives/data", json!({"drive_id": "data", "path_on_host": "other", "rate_limiter": limiter}))?;
    let data = &api.get_json("/vm/config")?["drives"][0];
    assert_eq!((&data["path_on_host"], &data["rate_limiter"]), (&json!("other"), &limiter));
    let config = &api.get_json("/vmm/v1/inspect")?["config"]["devices"];
    assert_eq!(config[1]["path"], json!("other"), "the root disk is the first: {config}");
    api.patch("/balloon", json!({"amount_mib": 16}))?;
    assert_eq!(api.get_json("/balloon")?["amount_mib"], json!(16));
    api.patch("/balloon/statistics", json!({"stats_polling_interval_s": 2}))?;
    api.patch("/vmm/v1/devices/balloon0", json!({"stats": 3}))?;
    assert_eq!(api.get_json("/vm/config")?["balloon"]["stats_polling_interval_s"], json!(3));
    let inflated = |event: &Value| {
        let of_balloon = (&event["device"], &event["fact"]) == (&json!("balloon0"), &json!("actual_bytes"));
        of_balloon && event["value"] == json!(16 << 20)
    };
    assert!(api.follow("/vmm/v1/events")?.any(|event| inflated(&event)));
    assert_eq!(api.get_json("/balloon/statistics")?["actual_mib"], json!(16));

    api.put("/actions", json!({"action_type": "FlushMetrics"}))?;
    let metrics: Value = serde_json::from_str(fs::read_to_string(setup.path("metrics"))?.trim())?;
    assert!(metrics["disk0"]["requests"].as_u64() > Some(0), "{metrics}");
    let prometheus = api.get("/vmm/v1/metrics")?.body;
    assert!(prometheus.contains("vmm_running{vm=\"web\"} 1\n"), "{prometheus}");
    assert!(fs::read_to_string(setup.path("log"))?.contains("user space reached"));

    api.put("/actions", json!({"action_type": "SendCtrlAltDel"}))?;
    let output = program.wait()?;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(fs::read_to_string(setup.path("console"))?.contains("user space reached"));
    assert!(!setup.path("api.sock").exists() && !setup.path("v.sock").exists());
    Ok(())
}

#[test]
fn what_is_wrong_is_refused_with_a_sentence_and_changes_nothing() -> Result<()> {
    let setup = Setup::new()?;
    let (_program, api) = setup.api()?;
    setup.configure(&api)?;
    let root = r#"{"drive_id":"r","path_on_host":"disk","is_root_device":true}"#;
    api.put("/drives/r", serde_json::from_str(root)?)?;
    let before = api.get_json("/vm/config")?;
    let large = format!("{{\"vcpu_count\": 1, \"mem_size_mib\": 1{}}}", " ".repeat(60_000));
    let cases = [
        ("PUT", "/machine-config", r#"{"vcpu_count":0,"mem_size_mib":16}"#, "0 vCPUs"),
        ("PUT", "/machine-config", r#"{"vcpu_count":33,"mem_size_mib":16}"#, "33 vCPUs"),
        ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":0}"#, "memory"),
        ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":18446744073709551615}"#, "MiB"),
        ("PUT", "/machine-config", r#"{"vcpu_count":1}"#, "missing field `mem_size_mib`"),
        ("PUT", "/machine-config", r#"{"vcpu_count":"1","mem_size_mib":16}"#, "invalid type"),
        ("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":16,"x":1}"#, "unknown field `x`"),
        (
            "PUT",
            "/machine-config",
            r#"{"vcpu_count":1,"mem_size_mib":16,"cpu_template":"T2"}"#,
            "cpu_template",
        ),
        ("PUT", "/machine-config", "", "JSON body"),
        ("PUT", "/machine-config", "{", "EOF"),
        ("PUT", "/machine-config", &large, "larger than 51200 bytes"),
        ("PUT", "/boot-source", r#"{"kernel_image_path":"nowhere"}"#, "'nowhere' cannot be opened"),
        ("PUT", "/boot-source", r#"{"kernel_image_path":"/"}"#, "is a directory"),
        (
            "PUT",
            "/drives/s",
            r#"{"drive_id":"t","path_on_host":"disk","is_root_device":false}"#,
            "does not match",
        ),
        (
            "PUT",
            "/drives/s",
            r#"{"drive_id":"s","path_on_host":"disk","is_root_device":true}"#,
            "already exists",
        ),
        (
            "PUT",
            "/drives/a.b",
            r#"{"drive_id":"a.b","path_on_host":"disk","is_root_device":false}"#,
            "is no ID",
        ),
        ("PUT", "/network-interfaces/e", r#"{"iface_id":"e","host_dev_name":"t","guest_mac":"1"}"#, "'1'"),
        ("PUT", "/vsock", r#"{"guest_cid":2,"uds_path":"v"}"#, "reserved"),
        ("PUT", "/balloon", r#"{"amount_mib":1,"deflate_on_oom":true,"free_page_hinting":true}"#, "hinting"),
        ("GET", "/balloon", "", "no balloon"),
        ("PATCH", "/drives/r", r#"{"drive_id":"r"}"#, "before starting"),
        ("PATCH", "/vm", r#"{"state":"Paused"}"#, "before starting"),
        ("PUT", "/actions", r#"{"action_type":"Dance"}"#, "unknown variant"),
        ("PUT", "/actions", r#"{"action_type":"SendCtrlAltDel"}"#, "before starting"),
        ("GET", "/", "{}", "no body"),
        ("GET", "/vmm/v1/console", "", "before starting"),
        ("GET", "/../etc/passwd", "", "Invalid request"),
    ];
    for (method, path, body, want) in cases {
        let fault =
            api.send(method, path, body)?.fault().with_context(|| format!("{method} {path} {body:.80}"))?;
        assert!(fault.contains(want) && !fault.contains('\n'), "{method} {path}: {fault}");
    }
    assert_eq!(api.get_json("/vm/config")?, before);

    // A machine that cannot be built does not end the program, and can be mended.
    api.put("/boot-source", json!({"kernel_image_path": "disk"}))?;
    let start = r#"{"action_type":"InstanceStart"}"#;
    let fault = api.send("PUT", "/actions", start)?.fault()?;
    assert!(fault.contains("'disk'"), "{fault}");
    setup.configure(&api)?;
    api.put("/actions", serde_json::from_str(start)?)?;
    for (method, path, body, want) in [
        ("PUT", "/actions", start, "after starting"),
        ("PUT", "/boot-source", r#"{"kernel_image_path":"kernel"}"#, "after starting"),
        ("PATCH", "/drives/x", r#"{"drive_id":"x"}"#, "no drive 'x'"),
        ("PATCH", "/drives/r", r#"{"drive_id":"r","path_on_host":"nowhere"}"#, "nowhere"),
        ("PATCH", "/balloon", r#"{"amount_mib":1}"#, "no balloon"),
        ("PATCH", "/vmm/v1/devices/disk0", r#"{"ro":true}"#, "ro"),
        ("PATCH", "/vmm/v1/devices/disk1", r#"{}"#, "no device 'disk1'"),
        ("PUT", "/vmm/v1/stop", r#"{"deadline_s":86401}"#, "86400"),
    ] {
        let fault =
            api.send(method, path, body)?.fault().with_context(|| format!("{method} {path} {body}"))?;
        assert!(fault.contains(want), "{method} {path}: {fault}");
    }
    Ok(())
}

#[test]
fn what_is_not_there_yet_and_metadata_that_cannot_be_are_refused_by_name() -> Result<()> {
    let setup = Setup::new()?;
    let (_program, api) = setup.api()?;
    // Short enough for a request, and longer when it is written as it was understood.
    let data = format!(r#"{{"a":[1e5{}]}}"#, ",1e5".repeat(12_000));
    for (method, path, body, want) in [
        (
            "PUT",
            "/snapshot/load",
            r#"{"snapshot_path":"disk","mem_backend":{"backend_type":"Uffd","backend_path":"u"}}"#,
            "is of no use",
        ),
        ("PUT", "/cpu-config", "{}", "custom processor templates are not supported yet"),
        ("PATCH", "/hotplug/memory", "{}", "plugging in memory while the machine runs is not supported yet"),
        ("PATCH", "/balloon/hinting/start", "{}", "free page hinting is not supported yet"),
        ("DELETE", "/drives/r", "", "DELETE /drives/r: taking a device away is not supported yet."),
        ("POST", "/drives/r", "", "Invalid request method and/or path: POST /drives/r."),
        ("PUT", "/pmem/p", r#"{"id":"p","path_on_host":"nowhere"}"#, "'nowhere' cannot be opened"),
        ("PUT", "/pmem/p", r#"{"id":"q","path_on_host":"disk"}"#, "does not match"),
        ("PUT", "/mmds/config", r#"{"network_interfaces":[]}"#, "network_interfaces is empty"),
        ("PUT", "/mmds/config", r#"{"network_interfaces":["e"]}"#, "no network interface 'e'"),
        ("PUT", "/mmds", "[1]", "invalid type"),
        ("PUT", "/mmds", &data, "The metadata would have"),
        ("PATCH", "/mmds", r#"{"a":"b"}"#, "not initialized"),
    ] {
        let fault = api.send(method, path, body)?.fault().with_context(|| format!("{method} {path}"))?;
        assert!(fault.contains(want), "{method} {path}: {fault}");
    }
    Ok(())
}

#[test]
fn files_that_make_their_readers_wait_are_refused() -> Result<()> {
    let setup = Setup::new()?;
    let (_program, api) = setup.api()?;
    ensure!(Command::new("mkfifo").arg(setup.path("fifo")).status()?.success(), "mkfifo");
    for (path, body) in [
        ("/boot-source", json!({"kernel_image_path": "fifo"})),
        ("/boot-source", json!({"kernel_image_path": "kernel", "initrd_path": "/dev/null"})),
        ("/drives/s", json!({"drive_id": "s", "path_on_host": "fifo", "is_root_device": false})),
    ] {
        let fault = api.send("PUT", path, &body.to_string())?.fault()?;
        assert!(fault.contains("is neither a file nor a block device"), "{fault}");
    }
    Ok(())
}

#[test]
fn the_socket_is_its_owners_alone_and_goes_with_the_program() -> Result<()> {
    let setup = Setup::new()?;
    let socket = setup.path("api.sock");
    let (first, api) = setup.api()?;
    assert_eq!(fs::metadata(&socket)?.permissions().mode() & 0o777, 0o600);
    let second = setup.start(&["api", "--api-sock", "api.sock"])?.wait()?;
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8(second.stderr)?.contains("it is in use"));
    assert_eq!(api.get("/")?.status, 200, "the first is as it was");

    // Killed, it leaves a socket that the next one replaces; ended by a signal, it leaves none.
    assert_eq!(first.signal(Signal::KILL)?.status.signal(), Some(9));
    assert!(socket.exists());
    let (third, _) = setup.api()?;
    assert_eq!(third.signal(Signal::TERM)?.status.signal(), Some(15));
    assert!(!socket.exists());

    // Nothing that is there is replaced or followed.
    fs::write(setup.path("file"), "mine")?;
    symlink("file", &socket)?;
    for path in ["api.sock", "file"] {
        let refused = setup.start(&["api", "--api-sock", path])?.wait()?;
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    }
    assert_eq!(fs::read_to_string(setup.path("file"))?, "mine");
    assert_eq!(fs::read_link(&socket)?, Path::new("file"));
    Ok(())
}

#[test]
fn clients_that_are_slow_rude_or_many_harm_nobody() -> Result<()> {
    let setup = Setup::new()?;
    let (program, api) = setup.api()?;
    setup.configure(&api)?;
    api.put("/actions", json!({"action_type": "InstanceStart"}))?;
    let mut clients = Vec::new();
    for (i, bytes) in [
        &b"GET / HT"[..],
        b"",
        b"PUT /vm HTTP/1.1\r\nContent-Length: 9\r\n\r\n{",
        b"\0\xff\r\n\r\n",
        b"GET /vmm/v1/events HTTP/1.1\r\nHost: x\r\n\r\n",
    ]
    .iter()
    .cycle()
    .take(200)
    .enumerate()
    {
        let mut client = api.connect().with_context(|| format!("client {i}"))?;
        client.write_all(bytes)?;
        clients.push(client);
    }
    // Some leave at once, and do not read what they asked for.
    clients.truncate(100);
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let api = api.clone();
            std::thread::spawn(move || (0..50).try_for_each(|_| api.get_json("/vmm/v1/inspect").map(drop)))
        })
        .collect();
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
    }
    api.patch("/vm", json!({"state": "Paused"}))?;
    api.patch("/vm", json!({"state": "Resumed"}))?;
    // Deadlines that are far away take nothing of the host.
    let tasks =
        || fs::read_dir(format!("/proc/{}/task", program.pid().as_raw_nonzero())).map(Iterator::count);
    let before = tasks()?;
    (0..100).try_for_each(|_| api.put("/vmm/v1/stop", json!({"deadline_s": 86_400})))?;
    // A pool for calls grows to 16.
    assert!(tasks()? <= before + 16, "{before} threads have become {}", tasks()?);
    // A request after the other on one connection, as clients do it.
    let mut connection = api.connect()?;
    for _ in 0..100 {
        connection.write_all(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")?;
        let mut answer = [0; 4096];
        let n = connection.read(&mut answer)?;
        ensure!(answer[..n].starts_with(b"HTTP/1.1 200"), "{:?}", String::from_utf8_lossy(&answer[..n]));
    }
    Ok(())
}

#[test]
fn events_are_told_from_the_start_to_the_end() -> Result<()> {
    let setup = Setup::new()?;
    let program = setup.start(&[
        "run",
        "--no-rootfs",
        "--kernel",
        "kernel",
        "--memory",
        "16M",
        "--api-sock",
        "api.sock",
    ])?;
    let api = Api::when_ready(&setup.path("api.sock"))?;
    let events = api.follow("/vmm/v1/events")?;
    api.patch("/vm", json!({"state": "Paused"}))?;
    api.patch("/vm", json!({"state": "Resumed"}))?;
    assert_eq!(api.get_json("/vmm/v1/inspect")?["state"], json!("running"));
    api.put("/vmm/v1/stop", json!({"deadline_s": 0}))?;
    let states: Vec<_> = events.filter_map(|event| event["state"].as_str().map(str::to_owned)).collect();
    assert_eq!(states, ["created", "running", "paused", "running", "stopping", "stopped"]);
    let output = program.wait()?;
    assert_eq!(output.status.code(), Some(1), "it was killed: {output:?}");
    assert!(!setup.path("api.sock").exists());
    Ok(())
}

#[test]
fn by_firecrackers_name_it_takes_firecrackers_flags() -> Result<()> {
    let setup = Setup::new()?;
    let link = setup.path("firecracker");
    symlink(env!("CARGO_BIN_EXE_vmm"), &link)?;
    let version = setup.start_as(&link, &["--version"])?.wait()?;
    assert!(String::from_utf8(version.stdout)?.starts_with("Firecracker v1."));

    Micro::new().print("up\n").reset().write(&setup.path("short"))?;
    let machine = json!({
        "boot-source": {"kernel_image_path": "short"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 16},
        "drives": [{"drive_id": "d", "path_on_host": "disk", "is_root_device": false}],
    });
    fs::write(setup.path("machine.json"), machine.to_string())?;
    let flags = [
        "--no-api",
        "--config-file",
        "machine.json",
        "--id",
        "a-b",
        "--level",
        "Debug",
        "--show-level",
        "--log-path",
        "log",
        "--metrics-path",
        "metrics",
        "--boot-timer",
        "--no-seccomp",
        "--enable-pci",
        "--show-log-origin",
        "--http-api-max-payload-size",
        "1000",
        "--mmds-size-limit",
        "1000",
    ];
    let output = setup.start_as(&link, &flags)?.wait()?;
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"up\n"[..]), "{output:?}");
    assert!(fs::read_to_string(setup.path("log"))?.contains("the guest rebooted"));
    assert!(fs::read_to_string(setup.path("metrics"))?.contains("\"disk0\""));

    fs::write(
        setup.path("machine.json"),
        json!({"boot-source": {"kernel_image_path": "nowhere"}}).to_string(),
    )?;
    let output = setup.start_as(&link, &["--no-api", "--config-file", "machine.json"])?.wait()?;
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stderr)?.contains("nowhere"));

    let program = setup.start_as(&link, &["--api-sock", "api.sock"])?;
    let api = Api::when_ready(&setup.path("api.sock"))?;
    setup.configure(&api)?;
    api.put("/actions", json!({"action_type": "InstanceStart"}))?;
    assert_eq!(program.signal(Signal::TERM)?.status.code(), Some(128 + 15));
    Ok(())
}

/// What a machine with a tap needs in front of it, as root or not.
fn with_tap(program: &Path) -> Vec<String> {
    let unshare = if rustix::process::geteuid().is_root() { "-n" } else { "-rn" };
    let set_up =
        "PATH=$PATH:/sbin:/usr/sbin && ip tuntap add dev tap0 mode tap && ip link set tap0 up && exec \"$@\"";
    [unshare, "sh", "-c", set_up, "sh"]
        .map(str::to_owned)
        .into_iter()
        .chain([program.display().to_string()])
        .collect()
}

#[test]
fn a_guest_gets_the_metadata_that_the_api_was_given_and_what_changes() -> Result<()> {
    let setup = Setup::new()?;
    let kernel = Kernel::ours(acceleration()).file()?;
    fs::copy(harness::demo_image()?, setup.path("root"))?;
    fs::write(setup.path("data.json"), r#"{"latest": {"name": "web", "gone": "x"}}"#)?;
    let link = setup.path("firecracker");
    symlink(env!("CARGO_BIN_EXE_vmm"), &link)?;
    let mut arguments = with_tap(&link);
    arguments.extend(["--api-sock", "api.sock", "--metadata", "data.json"].map(str::to_owned));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let program = setup.start_as(Path::new("unshare"), &arguments)?;
    let api = Api::when_ready(&setup.path("api.sock"))?;
    assert_eq!(api.get_json("/mmds")?["latest"]["name"], json!("web"));

    let script = "u=http://169.254.170.2/latest; wget -qO- $u/name 2>&1; \
        t=$(printf 'PUT /latest/api/token HTTP/1.0\\r\\nX-metadata-token-ttl-seconds: 60\\r\\n\\r\\n' | nc -w 9 169.254.170.2 80 | tail -n 1); \
        get() { wget -qO- --header X-metadata-token:$t $u/$1; }; echo got=$(get name); \
        until [ $(get name) = db ]; do sleep 0.1; done; echo now=$(get '')";
    let boot_args = format!(
        "console=ttyS0 reboot=k panic=1 ip=169.254.170.9:::255.255.255.0::eth0:off -- sh -c \"{script}\""
    );
    api.put("/boot-source", json!({"kernel_image_path": kernel, "boot_args": boot_args}))?;
    api.put("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 128}))?;
    api.put(
        "/drives/rootfs",
        json!({"drive_id": "rootfs", "path_on_host": "root", "is_root_device": true, "is_read_only": true}),
    )?;
    api.put("/network-interfaces/eth0", json!({"iface_id": "eth0", "host_dev_name": "tap0"}))?;
    let config = json!({"network_interfaces": ["eth0"], "version": "V2", "ipv4_address": "169.254.170.2"});
    let fault = api.send("PUT", "/mmds/config", &config.to_string().replace("170.2", "0.2"))?.fault()?;
    assert!(fault.contains("ipv4_address") && fault.contains("169.254.1.0"), "{fault}");
    api.put("/mmds/config", config)?;
    assert_eq!(api.get_json("/vm/config")?["mmds-config"]["version"], json!("V2"));
    api.put("/serial", json!({"serial_out_path": "console"}))?;
    api.put("/actions", json!({"action_type": "InstanceStart"}))?;
    let console = || fs::read_to_string(setup.path("console")).unwrap_or_default();
    while !console().contains("got=web") {
        ensure!(api.get("/").is_ok(), "it has ended: {}", console());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    api.patch("/mmds", json!({"latest": {"name": "db", "gone": null}}))?;
    assert_eq!(api.get_json("/mmds")?, json!({"latest": {"name": "db"}}));
    let output = program.wait()?;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    for text in ["401 Unauthorized", "now=name"] {
        assert!(console().contains(text), "{text}: {}", console());
    }
    Ok(())
}

#[test]
fn persistent_memory_is_a_device_like_any_other() -> Result<()> {
    let setup = Setup::new()?;
    fs::File::create(setup.path("image"))?.set_len(2 << 20)?;
    let (_program, api) = setup.api()?;
    setup.configure(&api)?;
    let pmem = json!({"id": "p", "path_on_host": "image", "read_only": true, "root_device": false});
    api.put("/pmem/p", pmem.clone())?;
    assert_eq!(api.get_json("/vm/config")?["pmem"], json!([pmem]));
    api.put("/actions", json!({"action_type": "InstanceStart"}))?;
    assert_eq!(api.get_json("/vmm/v1/inspect")?["devices"][0]["name"], json!("pmem0"));
    let limiter = json!({"ops": {"size": 10, "refill_time": 100}});
    api.patch("/pmem/p", json!({"id": "p", "rate_limiter": limiter}))?;
    assert_eq!(api.get_json("/vm/config")?["pmem"][0]["rate_limiter"], limiter);
    let fault = api.send("PATCH", "/pmem/q", r#"{"id":"q"}"#)?.fault()?;
    assert!(fault.contains("no persistent memory 'q'"), "{fault}");
    Ok(())
}

#[test]
fn who_has_sent_all_that_he_will_still_gets_his_answer() -> Result<()> {
    let setup = Setup::new()?;
    let (_program, api) = setup.api()?;
    for request in
        ["GET /version HTTP/1.1\r\nHost: x\r\n\r\n", "PUT /mmds HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}"]
    {
        let mut client = api.connect()?;
        client.write_all(request.as_bytes())?;
        client.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        client.read_to_string(&mut answer)?;
        assert!(answer.contains(" 20"), "{answer:?}");
    }
    Ok(())
}

#[test]
fn who_follows_events_before_the_start_sees_it() -> Result<()> {
    let setup = Setup::new()?;
    let (program, api) = setup.api()?;
    let events = api.follow("/vmm/v1/events")?;
    setup.configure(&api)?;
    api.put("/actions", json!({"action_type": "InstanceStart"}))?;
    api.put("/vmm/v1/stop", json!({"deadline_s": 0}))?;
    let states: Vec<_> = events.filter_map(|event| event["state"].as_str().map(str::to_owned)).collect();
    assert_eq!(states, ["created", "running", "stopping", "stopped"]);
    assert_eq!(program.wait()?.status.code(), Some(0));
    Ok(())
}

#[test]
fn the_description_is_what_the_program_says() -> Result<()> {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json");
    let now = vmm::api::open_api();
    let paths = serde_json::from_str::<Value>(&now)?["paths"].as_object().map(|paths| paths.len());
    assert!(paths > Some(15), "{now}");
    assert!(fs::read_to_string(&kept)? == now, "run: cargo run -- api --open-api > docs/openapi.json");
    Ok(())
}

#[test]
fn a_call_at_any_time_is_done_or_refused_with_a_sentence() -> Result<()> {
    let description: Value = serde_json::from_str(&vmm::api::open_api())?;
    let paths = description["paths"].as_object().context("it has paths")?;
    let setup = Setup::new()?;
    let (_program, api) = setup.api()?;
    let calls = paths.iter().flat_map(|(path, methods)| {
        let path = path.replace("{id}", "x");
        methods
            .as_object()
            .into_iter()
            .flatten()
            .map(move |(method, _)| (method.to_uppercase(), path.clone()))
    });
    // That answer has no end.
    let calls: Vec<_> = calls.filter(|(_, path)| path != "/vmm/v1/events").collect();
    ensure!(calls.len() > 35, "{calls:?}");
    let call_all = |state: &str| -> Result<()> {
        for ((method, path), body) in calls.iter().flat_map(|call| ["", "{}"].map(|body| (call, body))) {
            let answer = api.send(method, path, body)?;
            let told = matches!(answer.status, 200 | 204) || !answer.fault()?.is_empty();
            ensure!(told, "{state}: {method} {path} {body}: {answer:?}");
        }
        Ok(())
    };
    call_all("not started")?;
    setup.configure(&api)?;
    api.put("/actions", json!({"action_type": "InstanceStart"}))?;
    for state in ["Paused", "Resumed"] {
        api.patch("/vm", json!({"state": state}))?;
        call_all(state)?;
    }
    Ok(())
}

#[test]
fn what_is_being_saved_still_answers() -> Result<()> {
    let setup = Setup::new()?;
    // All of its memory is there, so that it takes a while to look through.
    let arguments = "run -q --no-rootfs --memory 1G --mem-prealloc --kernel kernel --api-sock api.sock";
    let _program = setup.start(&arguments.split(' ').collect::<Vec<_>>())?;
    let api = Api::when_ready(&setup.path("api.sock"))?;
    api.patch("/vm", json!({"state": "Paused"}))?;
    let saved = std::thread::spawn({
        let api = api.clone();
        move || api.send("PUT", "/vmm/v1/snapshot", r#"{"path": "saved"}"#)
    });
    let mut waiting = Vec::new();
    let mut answers = 0;
    while !saved.is_finished() {
        let inspection = api.get_json("/vmm/v1/inspect")?;
        // It may be resumed before all that was saved lasts.
        if (&inspection["state"], &inspection["saving"]) == (&json!("paused"), &json!(true)) {
            answers += 1;
            if waiting.is_empty() {
                // More than a few of whoever wants to change something wait, and keep nobody else waiting.
                let resume = || {
                    let api = api.clone();
                    std::thread::spawn(move || api.patch("/vm", json!({"state": "Resumed"})))
                };
                waiting = (0..24).map(|_| resume()).collect();
            }
        }
    }
    assert_eq!(saved.join().expect("no panic")?.status, 200);
    assert!(answers > 0);
    let resumed = waiting.into_iter().map(|call| call.join().expect("no panic"));
    ensure!(resumed.filter(Result::is_ok).count() >= 1, "somebody has resumed it");
    assert_eq!(api.get_json("/vmm/v1/inspect")?["state"], "running");
    Ok(())
}
