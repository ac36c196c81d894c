//! What the command does with snapshots that are there, with real guests: it looks at them, compares, merges and packs them,
//! and what comes of that goes on where it was. On this machine's /dev/kvm.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Result, ensure};
use harness::{Machines, SmallHost};
use serde_json::{Value, json};

/// Changes pieces of 16 MiB of memory, and looks before each time whether all of it is as it was left.
const CHECK: &str = "sum() { md5sum < /tmp/m | cut -c1-32; }; head -c 16777216 /dev/urandom > /tmp/m; was=$(sum); i=0; \
     while i=$((i+1)); do [ $(sum) = $was ] || { echo wrong $i; exit 1; }; \
     dd if=/dev/urandom of=/tmp/m bs=64k count=4 seek=$((i*7%252)) conv=notrunc 2>/dev/null; \
     was=$(sum); echo right $i; done";

fn machines() -> Result<Machines> {
    Machines::new(env!("CARGO_BIN_EXE_vmm"))
}

/// `vmm snapshot` with these words, in the directory of the machines.
fn tool(state: &Machines, words: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command.arg("snapshot").args(words.split_whitespace()).current_dir(state.dir());
    command.stdin(Stdio::null());
    command
}

/// What it prints, when it has to succeed without a word on standard error.
fn ok(state: &Machines, words: &str) -> Result<String> {
    let Output { status, stdout, stderr } = tool(state, words).output()?;
    ensure!(status.success() && stderr.is_empty(), "{words}: {status}, {}", String::from_utf8_lossy(&stderr));
    Ok(String::from_utf8(stdout)?)
}

fn json_of(state: &Machines, words: &str) -> Result<Value> {
    Ok(serde_json::from_str(&ok(state, &format!("{words} --format json"))?)?)
}

/// The lines that it says when it has to fail.
fn refused(state: &Machines, words: &str) -> Result<Vec<String>> {
    let Output { status, stdout, stderr } = tool(state, words).output()?;
    ensure!(status.code() == Some(1) && stdout.is_empty(), "{words}: {status}");
    Ok(String::from_utf8(stderr)?.lines().map(str::to_owned).collect())
}

/// How often a guest's log says that its memory is right; it must never say otherwise.
fn rounds(state: &Machines, name: &str) -> Result<usize> {
    let log = state.ok(&format!("logs {name}"))?;
    ensure!(!log.contains("wrong"), "{name}: {log}");
    Ok(log.lines().filter(|line| line.trim().starts_with("right ")).count())
}

fn wait_rounds(state: &Machines, name: &str, count: usize) -> Result<()> {
    while rounds(state, name)? < count {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Ok(())
}

/// A guest that checks its memory, and a chain `a`, `b`, `c`, `d` of snapshots of it, of which three are diffs.
fn chain(state: &Machines) -> Result<()> {
    // Not the command's own one, which is a file without a name.
    let root = format!("{},ro", harness::demo_image()?.display());
    let mut data = vec![0; 1 << 20];
    data[700_000..].fill(7);
    fs::write(state.dir().join("data"), data)?;
    let mut run = state.command("run -q --detach --name web --track-dirty --memory 128M --disk data");
    let output = run.args(["--rootfs", &root, "--", "sh", "-c", CHECK]).output()?;
    ensure!(output.status.success(), "{output:?}");
    for (to, more) in [("a", ""), ("b", "--diff"), ("c", "--diff"), ("d", "--diff")] {
        let now = rounds(state, "web")?;
        wait_rounds(state, "web", now + 2)?;
        state.ok(&format!("snapshot web --to {to} {more}"))?;
    }
    state.ok("kill web")?;
    Ok(())
}

fn goes_on(state: &Machines, from: &str) -> Result<()> {
    state.ok(&format!("restore {from} --detach --name from-{from}"))?;
    wait_rounds(state, &format!("from-{from}"), 3)?;
    state.ok(&format!("rm --force from-{from}"))?;
    Ok(())
}

#[test]
fn a_chain_that_is_merged_packed_and_unpacked_goes_on_where_it_was() -> Result<()> {
    let state = machines()?;
    chain(&state)?;
    for dir in ["a", "b", "c", "d"] {
        ok(&state, &format!("inspect {dir} --verify"))?;
    }
    let id = ok(&state, "merge d --to merged")?;
    let manifest = json_of(&state, "inspect merged")?["manifest"].clone();
    assert_eq!((&manifest["id"], &manifest["memory"]["diff"]), (&json!(id.trim()), &Value::Null));
    let packed = ok(&state, "pack merged --to merged.vmmsnap")?;
    assert_eq!(packed, id, "it stays the same");
    assert_eq!(ok(&state, "unpack merged.vmmsnap --to unpacked")?, id);
    // A chain is merged on its way through a pipe.
    let mut pack = tool(&state, "pack d --to -").stdout(Stdio::piped()).spawn()?;
    let pipe: Stdio = pack.stdout.take().expect("it is a pipe").into();
    ensure!(
        tool(&state, "unpack - --to piped").stdin(pipe).output()?.status.success() && pack.wait()?.success()
    );

    let nothing = json!({ "config": [], "sections": [], "memory": { "pages": 0, "bytes": 0, "ranges": [] } });
    for dir in ["merged", "unpacked", "piped"] {
        ok(&state, &format!("inspect {dir} --verify"))?;
        assert_eq!(json_of(&state, &format!("diff d {dir}"))?, nothing, "{dir}");
        let disk = |dir: &str| fs::read(state.dir().join(dir).join("disk1.raw"));
        ensure!(disk(dir)? == disk("d")? && disk(dir)?[700_000] == 7, "{dir}: its disk");
        let memory = fs::metadata(state.dir().join(dir).join("memory"))?;
        ensure!(memory.blocks() * 512 < 100 << 20, "{dir} has no holes: {} blocks", memory.blocks());
        // All that is needed is in it.
        goes_on(&state, dir)?;
    }
    for dir in ["a", "b", "c", "d"] {
        fs::remove_dir_all(state.dir().join(dir))?;
    }
    goes_on(&state, "piped")
}

#[test]
fn what_a_snapshot_is_and_what_differs_is_told() -> Result<()> {
    let state = machines()?;
    chain(&state)?;
    let text = ok(&state, "inspect d")?;
    let parent = json_of(&state, "inspect c")?["manifest"]["id"].as_str().unwrap_or_default().to_owned();
    for want in ["ID ", "by vmm ", "1 vCPU", &parent, "CHAIN", "rootfs", "0xd0000000", "vcpu0", "fpu"] {
        ensure!(text.contains(want), "{want}: {text}");
    }
    let told = json_of(&state, "inspect d")?;
    assert_eq!(told["chain"].as_array().map(Vec::len), Some(4));
    assert_eq!(told["manifest"]["memory"]["diff"]["parent"], *parent);
    let mut parts = told["state"].as_array().into_iter().flatten();
    ensure!(parts.any(|part| part["name"] == "machine" && part["version"] == 1), "{told}");

    let difference = json_of(&state, "diff c d")?;
    assert_eq!(difference["config"], json!([]));
    let sections: Vec<_> = difference["sections"].as_array().into_iter().flatten().collect();
    let vcpu = sections.iter().find(|section| section["name"] == "vcpu0");
    ensure!(vcpu.is_some_and(|vcpu| vcpu["fields"].to_string().contains("regs")), "{sections:?}");
    let pages = difference["memory"]["pages"].as_u64().unwrap_or_default();
    // Four pieces of 64 KiB a round, at least.
    ensure!((64..20_000).contains(&pages) && difference["memory"]["bytes"] == pages * 4096, "{pages} pages");
    let ranges = difference["memory"]["ranges"].as_array().into_iter().flatten();
    assert_eq!(ranges.filter_map(|range| range["bytes"].as_u64()).sum::<u64>(), pages * 4096);
    ensure!(ok(&state, "diff c d")?.contains("pages ("));
    assert_eq!(ok(&state, "diff d d")?, "Nothing differs.\n");
    Ok(())
}

#[test]
fn all_that_is_wrong_is_said_and_nothing_half_made_stays() -> Result<()> {
    let state = machines()?;
    let disk = state.dir().join("disk");
    File::create(&disk)?.set_len(1 << 20)?;
    state.ok("run --detach --name web IDLE --track-dirty --disk disk,ro")?;
    state.ok("snapshot web --to base")?;
    state.ok("snapshot web --to top --diff")?;
    state.ok("kill web")?;
    ok(&state, "inspect top --verify")?;
    ok(&state, "pack base --to packed")?;
    let names = || -> Result<Vec<_>> {
        let mut names: Vec<_> =
            fs::read_dir(state.dir())?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
        names.sort();
        Ok(names)
    };
    let before = names()?;
    for (words, want) in [
        ("merge top --to base", "choose another place"),
        ("merge top --to disk", "is no snapshot"),
        ("pack base --to packed", "is there already"),
        ("pack base --to missing/packed", "missing"),
        ("pack none --to x", "none"),
        ("unpack disk --to x", "is of no use"),
        ("unpack none --to x", "none"),
        ("diff base none", "none"),
    ] {
        let said = refused(&state, words)?;
        ensure!(said.len() == 1 && said[0].contains(want), "{words}: {said:?}");
    }
    let small = SmallHost::new("size=64k")?;
    let full = small.path("to");
    for words in
        [format!("merge base --to {}", full.display()), format!("unpack packed --to {}", full.display())]
    {
        // 64 KiB are less than a manifest and what the guest's program is.
        fs::write(small.path("ballast"), [1; 60 << 10])?;
        ensure!(refused(&state, &words)?.len() == 1, "{words}");
        assert_eq!(fs::read_dir(small.path(""))?.count(), 1, "{words}");
    }
    assert_eq!(names()?, before);

    flip(&state.dir().join("base/memory"))?;
    flip(&state.dir().join("top/state"))?;
    File::options().write(true).open(&disk)?.set_len(512)?;
    for (words, wants) in [
        ("inspect top --verify", ["state of the snapshot 'top'", "base/memory' has other contents"]),
        (
            "inspect base --verify",
            ["base/memory' has other contents", "has 512 bytes, and the guest has seen 1048576"],
        ),
    ] {
        let said = refused(&state, words)?;
        ensure!(
            said.len() == 2 && said.iter().zip(wants).all(|(line, want)| line.contains(want)),
            "{said:?}"
        );
    }
    fs::remove_file(&disk)?;
    ensure!(refused(&state, "inspect base --verify")?.iter().any(|line| line.contains("cannot be read")));
    Ok(())
}

#[test]
fn the_metadata_of_a_guest_is_in_no_snapshot() -> Result<()> {
    let state = machines()?;
    let write =
        |name: &str, value: &str| fs::write(state.dir().join(name), json!({ "key": value }).to_string());
    write("parent.json", "hunter2")?;
    write("clone.json", "hunter3")?;
    state.ok("run --detach --name web IDLE --net user,metadata=parent.json")?;
    ensure!(state.ok("inspect web")?.contains("hunter2"));
    state.ok("snapshot web --to saved")?;
    for name in ["manifest.json", "state"] {
        let bytes = fs::read(state.dir().join("saved").join(name))?;
        ensure!(!bytes.windows(7).any(|word| word == b"hunter2"), "{name}");
    }
    let manifest = json_of(&state, "inspect saved")?["manifest"].clone();
    let nets: Vec<_> = manifest["config"]["devices"].as_array().into_iter().flatten().collect();
    let net = nets.iter().find(|device| device["kind"] == "net").expect("it has one");
    assert_eq!(net["metadata"], json!({ "data": {} }));
    state.ok("restore saved --detach --name clone --set net0.metadata=clone.json")?;
    ensure!(state.ok("inspect clone")?.contains("hunter3"));
    ensure!(state.ok("inspect web")?.contains("hunter2"), "the parent has its own");
    Ok(())
}

#[test]
fn a_snapshot_of_a_machine_with_a_profile_has_its_features_only() -> Result<()> {
    let state = machines()?;
    fs::write(state.dir().join("list.toml"), "features = [\"v1\", \"cx16\"]")?;
    for (profile, has, lacks) in
        [("v1", "sse2", "cx16"), ("list.toml", "cx16", "lahf_lm"), ("host", "lahf_lm", "nothing")]
    {
        state.ok(&format!("run --detach --name web IDLE --cpu-profile {profile}"))?;
        state.ok("snapshot web --to saved")?;
        state.ok("rm --force web")?;
        let features = json_of(&state, "inspect saved")?["cpu_features"].clone();
        let names: Vec<_> = features.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        ensure!(names.contains(&has) && !names.contains(&lacks), "{profile}: {names:?}");
        state.ok("restore saved --detach --name again")?;
        state.ok("rm --force again")?;
    }
    fs::write(state.dir().join("none.json"), "[\"3dnow\", \"v1\"]")?;
    let said = state.refused("run --name web IDLE --cpu-profile none.json", 1)?;
    ensure!(said.contains("cannot give a guest: 3dnow;"), "{said}");
    for (profile, want) in [("v9", "neither host nor a level"), ("idle", "")] {
        let said = state.refused(&format!("run --name web IDLE --cpu-profile {profile}"), 2)?;
        ensure!(said.contains(want), "{said}");
    }
    fs::write(state.dir().join("wrong.json"), "[\"avx3\"]")?;
    let said = state.refused("run --name web IDLE --cpu-profile wrong.json", 2)?;
    ensure!(said.contains("'avx3' is no feature"), "{said}");
    Ok(())
}

/// Changes a byte that is no hole.
fn flip(path: &Path) -> Result<()> {
    let bytes = fs::read(path)?;
    let at = bytes.iter().rposition(|byte| *byte != 0).unwrap_or_default();
    File::options().write(true).open(path)?.write_all_at(&[bytes[at] ^ 1], at as u64)?;
    Ok(())
}
