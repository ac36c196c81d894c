//! The command line as its users meet it: mistakes, configuration files, dry runs, completion, manual pages.
//! No guest runs here, and none is needed.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use harness::micro::Micro;
use tempfile::TempDir;

/// A directory with a kernel `k`, a disk `d`, and files that are neither. All can read it.
struct Fixture {
    dir: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::Builder::new().permissions(Permissions::from_mode(0o755)).tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();
        let kernel = Micro::new().reset().elf();
        write("k", &kernel);
        write("d", &[0; 4096]);
        write("empty", b"");
        write("text", b"This is no kernel.\n");
        write("gzip", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03");
        let mut elf32 = kernel.clone();
        elf32[4] = 1;
        write("elf32", &elf32);
        write("cut", &kernel[..100]);
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `vmm` in this directory, with `arguments` separated by spaces.
    fn vmm(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
        command.args(arguments.split_whitespace()).current_dir(self.dir.path()).stdin(Stdio::null());
        // No kernel is built for a test of a mistake.
        command.env("XDG_CACHE_HOME", "/dev/null/cache").env_remove("VMM_LOG");
        command
    }

    /// What a shell is told that asks for the last word of `line`.
    fn completes(&self, line: &str) -> Vec<String> {
        let words: Vec<&str> = line.split(' ').collect();
        let mut command = self.vmm("--");
        command.args(&words).env("VMM_COMPLETE", "bash").env("_CLAP_IFS", "\n");
        let output = command.env("_CLAP_COMPLETE_INDEX", (words.len() - 1).to_string()).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{line}: {output:?}");
        String::from_utf8(output.stdout).unwrap().lines().map(|line| line.trim().to_owned()).collect()
    }

    fn output(&self, arguments: &str) -> Output {
        self.vmm(arguments).output().unwrap()
    }

    /// Standard output of a call that succeeds and says nothing else.
    fn prints(&self, arguments: &str) -> String {
        let output = self.output(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments}: {output:?}");
        assert!(output.stderr.is_empty(), "{arguments}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

/// The call ended with `status` and said nothing but one line, with all of `wants` in it.
#[track_caller]
fn assert_mistake(output: &Output, status: i32, wants: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(output.stdout.is_empty(), "{output:?}");
    assert!(said.starts_with("vmm: ") && said.ends_with('\n') && said.lines().count() == 1, "{said:?}");
    assert!(!said.contains("os error"), "{said}");
    for want in wants {
        assert!(said.contains(want), "'{want}' is not in: {said}");
    }
}

#[test]
fn without_kvm_nothing_is_built_first() {
    let fixture = Fixture::new();
    let alone = if rustix::process::geteuid().is_root() { "-m" } else { "-rm" };
    // What is not there may be called /dev/kvm as well.
    let script = "! [ -e /dev/kvm ] || mount --bind /dev/null /dev/kvm; exec \"$0\" run";
    let mut command = Command::new("unshare");
    command.args([alone, "sh", "-c", script, env!("CARGO_BIN_EXE_vmm")]).stdin(Stdio::null());
    let output = command.env("XDG_CACHE_HOME", fixture.path("cache")).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("kvm") && said.lines().count() == 1, "{said}");
    assert!(!fixture.path("cache").exists());
}

#[test]
fn wrong_flags_are_told_with_what_would_be_right() {
    let fixture = Fixture::new();
    for (arguments, wants) in [
        ("rum", &["unrecognized subcommand 'rum'", "'run'"][..]),
        ("run --kernle k", &["'--kernle'", "did you mean '--kernel'?"]),
        ("run --disc d", &["did you mean '--disk'?"]),
        ("run k", &["unexpected argument 'k'", "see 'vmm run --help'"]),
        ("run uname -a", &["unexpected argument 'uname'", "behind '--': 'vmm run -- uname'"]),
        ("check k", &["unexpected argument 'k' found; see 'vmm check --help'"]),
        ("run --vsock s --vsock t", &["a Linux guest takes one vsock device; leave the others out"]),
        ("run --rootfs d --pmem path=p,root", &["both 'rootfs' and 'pmem0' are to be the root file system"]),
        ("run --kernel", &["a value is required for '--kernel <PATH>'"]),
        ("run --kernel k --kernel k", &["cannot be used multiple times"]),
        ("run --cpus 0", &["write a number from 1 to 32"]),
        ("run --cpus 33", &["write a number from 1 to 32"]),
        ("run --cpus two", &["write a number from 1 to 32"]),
        ("run --memory lots", &["'lots' is not a size", "256M"]),
        ("run --memory 1M", &["1M of memory are not possible", "4M to 1T"]),
        ("run --memory 2T", &["2T of memory are not possible"]),
        ("run --memory 4194305", &["multiples of 4K"]),
        ("run --memory 99999999999T", &["too large"]),
        ("run --serial tty", &["use stdio, null or file=PATH"]),
        ("run --boot-protocol bios", &["auto, linux, pvh"]),
        ("run --disk d,speed=9", &["unknown key 'speed'", "path, ro"]),
        ("run --disk ro", &["cannot open disk 'ro'"]),
        ("run --net mac=02:00:00:00:00:01", &["give one of user, tap, tap=NAME and fd=NUMBER"]),
        ("run --net tap=t,mac=1", &["'1' is not a MAC address"]),
        ("run --vsock cid=5", &["'path' is missing; add path=VALUE"]),
        ("run --vsock s,cid=-1", &["cid=-1: expected a number from 0 to 4294967295"]),
        ("run --rng --no-rng", &["cannot be used with"]),
        ("run --rootfs d --no-rootfs", &["cannot be used with"]),
        ("run -v -q", &["cannot be used with '--quiet'"]),
        ("run -- a\"b", &["cannot pass", "double quote"]),
        ("check --format xml", &["text, json", "see 'vmm check --help'"]),
        ("completion tcsh", &["bash, zsh, fish"]),
        ("man nothing", &["there is no subcommand 'nothing'", "run, check"]),
    ] {
        let status = if arguments == "run --disk ro" { 1 } else { 2 };
        assert_mistake(&fixture.output(arguments), status, wants);
    }
    let long = "x".repeat(2048);
    assert_mistake(
        &fixture.vmm("run --kernel k --append").arg(&long).output().unwrap(),
        2,
        &["2047 is the limit"],
    );
    assert_mistake(&fixture.vmm("run --kernel k --append").arg("a\nb").output().unwrap(), 2, &["line break"]);
    let words = " x".repeat(33);
    assert_mistake(&fixture.output(&format!("run --kernel k --{words}")), 2, &["33 words"]);
    let nets = " --net tap=t".repeat(18);
    assert_mistake(&fixture.output(&format!("run --kernel k{nets}")), 2, &["17 is the limit"]);
    // With rng, balloon and this project's own root disk, which no file has to be made for to be counted.
    let nets = " --net tap=t".repeat(15);
    for dry in ["", "--dry-run"] {
        let wants = ["18 devices are too many; 17 is the limit", "--no-rootfs"];
        assert_mistake(&fixture.output(&format!("run {dry} --kernel k{nets}")), 2, &wants);
        let fits = fixture.output(&format!("run {dry} --no-rootfs --kernel k{nets}"));
        assert_mistake(&fits, 1, &["cannot open tap 't'"]);
    }
    let level = fixture.vmm("run --kernel k").env("VMM_LOG", "loud").output().unwrap();
    assert_mistake(&level, 2, &["VMM_LOG=loud", "trace"]);
}

#[test]
fn missing_and_wrong_files_are_told_apart_in_both_a_run_and_a_dry_run() {
    let fixture = Fixture::new();
    rustix::fs::mknodat(rustix::fs::CWD, fixture.path("fifo"), rustix::fs::FileType::Fifo, 0o644.into(), 0)
        .unwrap();
    for (arguments, wants) in [
        ("--kernel nothing", &["cannot open kernel 'nothing': no such file; name another file"][..]),
        ("--kernel .", &["not a regular file"]),
        ("--kernel fifo", &["not a regular file"]),
        ("--kernel empty", &["'empty' is no kernel: it is neither an ELF vmlinux nor a bzImage"]),
        ("--kernel text", &["'text' is no kernel"]),
        ("--kernel gzip", &["'gzip' is no kernel: it is gzip data; decompress it first"]),
        ("--kernel elf32", &["'elf32' is no kernel", "not for x86-64"]),
        ("--kernel cut", &["'cut' is no kernel"]),
        ("--kernel k --initrd nothing", &["cannot open initrd 'nothing': no such file"]),
        ("--kernel k --initrd empty", &["cannot open initrd 'empty': the file is empty"]),
        ("--kernel k --initrd fifo", &["cannot open initrd 'fifo': not a regular file"]),
        ("--kernel k --rootfs nothing", &["cannot open disk 'nothing': no such file"]),
        ("--kernel k --rootfs .", &["it is a directory"]),
        ("--kernel k --rootfs empty", &["cannot open disk 'empty': it is empty"]),
        ("--kernel k --rootfs text", &["19 bytes is not a multiple of 512"]),
        ("--kernel k --rootfs d --disk d", &["another VM is using it"]),
        ("--kernel k --disk d,id=much-too-long-for-an-id", &["at most 20 ASCII characters"]),
        ("--kernel k --net tap=nothing", &["cannot open tap 'nothing': no such interface"]),
        ("--config nothing", &["cannot read configuration 'nothing': no such file"]),
        ("--config .", &["cannot read configuration '.'"]),
        ("--config /dev/zero", &["larger than 1 MiB"]),
        ("--kernel k --serial file=/nonexistent/log", &["cannot write the console to '/nonexistent/log'"]),
        ("--kernel k --serial file=.", &["cannot write the console to '.'"]),
    ] {
        let root = if arguments.contains("--rootfs") { "" } else { "--no-rootfs" };
        assert_mistake(&fixture.output(&format!("run {root} {arguments}")), 1, wants);
        assert_mistake(&fixture.output(&format!("run {root} {arguments} --dry-run")), 1, wants);
    }
    assert_mistake(&fixture.output("run --dry-run --initrd nothing"), 1, &["cannot open initrd 'nothing'"]);
}

#[test]
fn a_console_does_not_go_over_what_the_machine_is_made_of() {
    let fixture = Fixture::new();
    fs::write(fixture.path("c.json"), "{\"serial\": \"file=c.json\"}").unwrap();
    fs::hard_link(fixture.path("d"), fixture.path("hard")).unwrap();
    std::os::unix::fs::symlink("k", fixture.path("soft")).unwrap();
    for (arguments, wants) in [
        ("--kernel k --serial file=k", &["'k'", "the machine's kernel", "give --serial another file"][..]),
        ("--kernel k --serial file=soft", &["'soft'", "the machine's kernel"]),
        ("--kernel k --initrd text --serial file=text", &["the machine's initrd"]),
        ("--kernel k --disk d --serial file=hard", &["the machine's disk 'd'"]),
        ("--kernel k --rootfs d --serial file=./d", &["the machine's disk 'd'"]),
        ("--kernel k --config c.json", &["the machine's configuration"]),
        (
            "--kernel k --console file=soft",
            &["'soft'", "the machine's kernel", "give --console another file"],
        ),
        ("--kernel k --pmem path=d --console file=hard", &["the machine's image 'd'"]),
    ] {
        let root = if arguments.contains("--rootfs") { "" } else { "--no-rootfs" };
        for dry in ["", "--dry-run"] {
            let files = ["k", "d", "text", "c.json"];
            let before = files.map(|name| fs::read(fixture.path(name)).unwrap());
            assert_mistake(&fixture.output(&format!("run {root} {dry} {arguments}")), 2, wants);
            assert!(files.map(|name| fs::read(fixture.path(name)).unwrap()) == before, "{arguments}");
        }
    }
}

#[test]
fn a_dry_run_does_not_wait_for_a_reader_of_the_console() {
    let fixture = Fixture::new();
    rustix::fs::mknodat(rustix::fs::CWD, fixture.path("fifo"), rustix::fs::FileType::Fifo, 0o644.into(), 0)
        .unwrap();
    let arguments = "run --dry-run --kernel k --serial file=fifo";
    let output = Command::new("timeout")
        .args(["60", env!("CARGO_BIN_EXE_vmm")])
        .args(arguments.split(' '))
        .current_dir(fixture.dir.path())
        .output()
        .unwrap();
    assert_mistake(&output, 1, &["cannot write the console to 'fifo'", "it is a FIFO that nobody reads"]);
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
    let _reader = rustix::fs::open(fixture.path("fifo"), flags, rustix::fs::Mode::empty()).unwrap();
    fixture.prints(arguments);
}

/// `vmm` as a user who is not root, from a copy that such a user can execute.
fn as_nobody(fixture: &Fixture, arguments: &str) -> Command {
    const NOBODY: u32 = 65534;
    let copy = fixture.path("vmm");
    if !copy.exists() {
        fs::copy(env!("CARGO_BIN_EXE_vmm"), &copy).unwrap();
    }
    let mut command = Command::new(copy);
    command.args(arguments.split_whitespace()).current_dir(fixture.dir.path()).stdin(Stdio::null());
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

#[test]
fn what_may_not_be_read_is_told() {
    let fixture = Fixture::new();
    for name in ["k2", "d2", "c2"] {
        fs::copy(fixture.path("k"), fixture.path(name)).unwrap();
        fs::set_permissions(fixture.path(name), Permissions::from_mode(0o000)).unwrap();
    }
    fs::set_permissions(fixture.path("d"), Permissions::from_mode(0o444)).unwrap();
    for (arguments, want) in [
        ("--kernel k2", "cannot open kernel 'k2': permission denied"),
        ("--kernel k --initrd k2", "cannot open initrd 'k2': permission denied"),
        ("--kernel k --disk d2", "cannot open disk 'd2'"),
        ("--kernel k --disk d", "no permission to write"),
        ("--config c2", "cannot read configuration 'c2': permission denied"),
    ] {
        let arguments = format!("run --no-rootfs --dry-run {arguments}");
        assert_mistake(&as_nobody(&fixture, &arguments).output().unwrap(), 1, &[want]);
    }
    assert!(as_nobody(&fixture, "run --dry-run --kernel k --disk d,ro").output().unwrap().status.success());

    // Where others may not use /dev/kvm, both commands say what to do.
    let check = as_nobody(&fixture, "check --format json").output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&check.stdout).unwrap();
    assert_eq!(check.status.code(), Some(if report["guest_can_run"] == true { 0 } else { 1 }));
    if report["items"][0]["ok"] == false {
        let run = as_nobody(&fixture, "run --kernel k --no-rootfs").output().unwrap();
        assert_mistake(&run, 1, &["cannot open /dev/kvm", ";"]);
    }
}

#[test]
fn a_dry_run_is_a_configuration_and_makes_nothing() {
    let fixture = Fixture::new();
    fs::write(fixture.path("e"), [0; 512]).unwrap();
    let before = names(fixture.dir.path());
    for arguments in [
        "",
        "--no-rng --balloon size=8M,stats=5",
        "--kernel k --rootfs d,ro --cpus 4 --memory 1536M --initrd text --serial file=log",
        "--kernel k --cmdline console=ttyS0 --append quiet --boot-protocol pvh --serial null",
        "--kernel k --disk path=d,id=data --disk e,ro --rng -- sh -c true",
    ] {
        let json = fixture.prints(&format!("run --dry-run {arguments}"));
        let value: serde_json::Value = serde_json::from_str(&json).unwrap();
        fs::write(fixture.path("c.json"), &json).unwrap();
        fs::write(fixture.path("c.toml"), toml::to_string(&value).unwrap()).unwrap();
        fs::copy(fixture.path("c.json"), fixture.path("j")).unwrap();
        fs::copy(fixture.path("c.toml"), fixture.path("t")).unwrap();
        for file in ["c.json", "c.toml", "j", "t"] {
            assert_eq!(
                fixture.prints(&format!("run --dry-run --config {file}")),
                json,
                "{arguments}: {file}"
            );
        }
        let flagged = fixture.prints("run --dry-run --config c.json --cpus 3 --memory 64M");
        let flagged: serde_json::Value = serde_json::from_str(&flagged).unwrap();
        assert_eq!((&flagged["cpus"], &flagged["memory"]), (&3.into(), &"64M".into()));
        assert_eq!(flagged["devices"], value["devices"]);
        for file in ["c.json", "c.toml", "j", "t"] {
            fs::remove_file(fixture.path(file)).unwrap();
        }
    }
    assert_eq!(names(fixture.dir.path()), before);
}

fn names(dir: &Path) -> Vec<PathBuf> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names
}

#[test]
fn bad_configuration_files_are_refused_with_the_place_and_the_keys() {
    let fixture = Fixture::new();
    for (name, text, wants) in [
        ("a.json", "{\"cpu\": 1}", &["unknown field `cpu`", "`cpus`", "line 1"][..]),
        ("a.toml", "cpus = 1\nmem = \"1G\"\n", &["unknown field `mem`", "`memory`", "line 2"]),
        ("a.json", "{\"cpus\": 1", &["line 1"]),
        ("a.json", "", &["EOF"]),
        ("a.json", "[]", &["line 1"]),
        ("a.toml", "cpus = \"many\"", &["line 1"]),
        ("a.json", "{\"cpus\": 999}", &["999"]),
        ("a.json", "{\"cpus\": 33}", &["33 vCPUs are not possible"]),
        ("a.json", "{\"memory\": \"1M\"}", &["1M of memory"]),
        ("a.json", "{\"devices\": [{\"kind\": \"floppy\"}]}", &["unknown variant `floppy`", "`disk`"]),
        ("a.json", "{\"devices\": [{\"kind\": \"disk\"}]}", &["missing field `path`"]),
        (
            "a.json",
            "{\"devices\": [{\"kind\": \"disk\", \"path\": \"d\", \"rw\": true}]}",
            &["unknown field `rw`"],
        ),
        ("a.json", "{\"serial\": \"tty\"}", &["use stdio, null or file=PATH"]),
        ("a", "\u{0}\u{1}", &["'a' is not valid"]),
    ] {
        fs::write(fixture.path(name), text).unwrap();
        for dry in ["", "--dry-run"] {
            assert_mistake(&fixture.output(&format!("run {dry} --config {name}")), 2, wants);
        }
    }
    fs::write(fixture.path("latin1"), b"kernel = \"\xe4\"").unwrap();
    assert_mistake(&fixture.output("run --config latin1"), 1, &["UTF-8"]);
    let deep = "[".repeat(100_000);
    fs::write(fixture.path("deep.toml"), format!("a = {deep}")).unwrap();
    fs::write(fixture.path("deep.json"), deep).unwrap();
    assert_mistake(&fixture.output("run --config deep.json"), 2, &["'deep.json' is not valid"]);
    assert_mistake(&fixture.output("run --config deep.toml"), 2, &["'deep.toml' is not valid"]);
}

#[test]
fn help_completion_and_manual_pages_know_every_flag() {
    let fixture = Fixture::new();
    let flags = [
        "--kernel",
        "--rootfs",
        "--config",
        "--dry-run",
        "--disk",
        "--net",
        "--rng",
        "--no-rng",
        "--vsock",
        "--console",
    ];
    for arguments in ["run --help", "help run", "man run"] {
        let text = fixture.prints(arguments).replace("\\-", "-");
        for flag in flags {
            assert!(text.contains(flag), "{arguments} does not know {flag}");
        }
    }
    for (shell, command) in
        [("bash", "complete -o nospace"), ("zsh", "compdef"), ("fish", "complete --keep-order")]
    {
        let text = fixture.prints(&format!("completion {shell}"));
        assert!(text.contains(command) && text.contains("VMM_COMPLETE"), "{text}");
    }
    let text = fixture.completes("vmm run --");
    assert!(flags.iter().all(|flag| text.iter().any(|known| known == flag)), "{text:?}");
    assert_eq!(fixture.completes("vmm pau"), ["pause"]);
    assert_eq!(fixture.completes("vmm stats --format j"), ["json"]);
    for name in ["web", "web-2", "db"] {
        fs::create_dir_all(fixture.path("state").join(name)).unwrap();
        fs::write(fixture.path("state").join(name).join("lock"), "").unwrap();
    }
    assert_eq!(fixture.completes("vmm stop --state-dir state w"), ["web", "web-2"]);
    assert_eq!(fixture.completes("vmm rm --state-dir state web d"), ["db"]);
    assert!(fixture.completes("vmm attach --state-dir nowhere w").is_empty());
    assert!(!fixture.path("nowhere").exists());
    assert!(fixture.prints("man run").starts_with(".ie"), "roff");
    assert!(fixture.prints("man").contains("completion"));
    assert!(fixture.prints("run --help").contains("128+N"), "exit statuses");
    assert_eq!(fixture.prints("--version"), format!("vmm {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn without_arguments_the_help_is_shown_and_nothing_is_done() {
    let output = Fixture::new().output("");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("Usage: vmm"));
}

#[test]
fn a_full_or_closed_output_is_no_panic() {
    let fixture = Fixture::new();
    for arguments in ["man run", "completion bash", "run --dry-run --kernel k"] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let output = fixture.vmm(arguments).stdout(full).stderr(Stdio::piped()).output().unwrap();
        assert_mistake(&output, 1, &["cannot write to standard output"]);
        let (read, write) = rustix::pipe::pipe().unwrap();
        drop(read);
        let output = fixture.vmm(arguments).stdout(write).stderr(Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(141), "{arguments}: {output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
    }
    for arguments in ["--version", "--help", "run --help"] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let output = fixture.vmm(arguments).stdout(full).stderr(Stdio::piped()).output().unwrap();
        assert_mistake(&output, 1, &["cannot write to standard output"]);
    }
}

#[test]
fn a_check_reports_every_capability_in_both_forms() {
    let fixture = Fixture::new();
    let text = fixture.output("check");
    let json = fixture.output("check --format json");
    assert_eq!(text.status, json.status);
    let report: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    let items = report["items"].as_array().unwrap();
    let names: Vec<&str> = items.iter().map(|item| item["name"].as_str().unwrap()).collect();
    for name in
        ["/dev/kvm", "hardware acceleration", "huge pages", "/dev/net/tun", "io_uring", "user namespaces"]
    {
        assert!(names.contains(&name), "{name}");
    }
    if items[0]["ok"] == true {
        for (_, capability) in vmm_core::hypervisor::kvm::CAPABILITIES {
            assert!(names.contains(capability), "{capability}");
        }
    }
    for item in items {
        let name = item["name"].as_str().unwrap();
        let mark = if item["ok"] == true { "ok     " } else { "missing" };
        assert!(text.lines().any(|line| line.starts_with(&format!("{mark} {name} "))), "{name}: {text}");
        assert_eq!(item["ok"] == true, item.get("remedy").is_none(), "what is missing has a remedy: {item}");
    }
}
