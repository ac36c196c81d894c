//! A guest that never rests moves from machine to machine, and loses nothing: no byte of memory, disk or stream, no
//! line of its console, no tick of a timer, no time. Real commands and guests on this machine's /dev/kvm.

use std::fs::{self, File};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use harness::net::{GUEST_ADDRESS, HOST_ADDRESS, TAP};
use harness::{Machines, Needs, NetNs, Place, Process, losses, tools_image};

/// How often it moves.
const MOVES: u32 = 50;
/// Only ends a hang.
const DEADLINE: Duration = Duration::from_secs(60);
/// By how much the monotonic clock may be wrong after a move, in nanoseconds.
const TOLERANCE: i64 = 10_000_000;
/// Where the other end of its stream listens.
const PORT: u16 = 5001;

/// fio writes random blocks with a checksum in each and reads them back, again and again as long as `losses` runs, which loads
/// all else. Then it is told what fio has read and written in KiB.
const LOAD: &str = "work() { i=0; while ! test -e /tmp/end; do i=$((i+1)); \
     fio --name=v --filename=/dev/vdb --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=4k-64k --bs_unaligned=0 \
     --size=8m --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=64 --randseed=$i --minimal > /tmp/out 2>&1 \
     || { cat /tmp/out; echo fio failed; return 1; }; cut -d';' -f6,47 /tmp/out >> /tmp/sums; done; }; \
     cd /tmp; work & losses ADDRESS; status=$?; touch /tmp/end; wait $! || status=1; \
     sed 's/^/fio: /' /tmp/sums; exit $status";

/// `losses` beside the machine.
struct Losses {
    process: Process,
    /// Ticks, passes over the memory, bytes of the stream that came there, and here.
    counts: [u64; 4],
    /// The least and the most nanoseconds that the guest's monotonic clock can be behind the host's, by all answers of one
    /// machine.
    behind: [i64; 2],
}

impl Losses {
    fn start(net: &NetNs) -> Result<Self> {
        let mut process = net.start(&format!("exec {} serve {PORT}", losses()?.display()))?;
        process.expect("serving", DEADLINE)?;
        Ok(Self { process, counts: [0; 4], behind: [i64::MIN, i64::MAX] })
    }

    /// Asks the guest how far it is.
    fn ask(&mut self) -> Result<()> {
        self.process.send("\n")?;
        self.process.expect("answer: ", DEADLINE)?;
        let line = self.process.expect("\n", DEADLINE)?;
        let numbers = line.split_whitespace().map(|word| Ok(word.parse()?)).collect::<Result<Vec<i64>>>()?;
        let [before, after, monotonic, _, backwards, ref counts @ ..] = numbers[..] else {
            bail!("'{line}' is no answer")
        };
        ensure!(backwards == 0, "{backwards} steps backwards");
        self.behind = [self.behind[0].max(before - monotonic), self.behind[1].min(after - monotonic)];
        let counts = counts.iter().map(|&count| count as u64).collect::<Vec<_>>();
        self.counts = counts.try_into().ok().with_context(|| format!("'{line}' counts something else"))?;
        Ok(())
    }

    /// Asks until all that it counts is more than it was.
    fn until_all_went_on(&mut self) -> Result<()> {
        self.ask()?;
        let (began, since) = (Instant::now(), self.counts);
        while self.counts.iter().zip(&since).any(|(now, was)| now <= was) {
            ensure!(began.elapsed() < DEADLINE, "it was at {since:?}, and is at {:?}", self.counts);
            thread::sleep(Duration::from_millis(10));
            self.ask()?;
        }
        Ok(())
    }
}

/// The clocks of machines one after the other went on as the host's did, also while the guest was in none.
fn clocks_went_on(behind: &[[i64; 2]]) -> Result<()> {
    for (number, two) in behind.windows(2).enumerate() {
        let [[least, most], [then_least, then_most]] = two else { bail!("two") };
        let (least, most) = (least - TOLERANCE, most + TOLERANCE);
        ensure!(
            *then_least <= most && *then_most >= least && least <= most,
            "move {number}: the clock was {:?} ns behind, and then {:?}",
            two[0],
            two[1]
        );
    }
    Ok(())
}

/// What the guest has said in all of its machines: it goes on in the middle of a line.
struct Console(String);

impl Console {
    /// The guest is not on this machine any more.
    fn add(&mut self, state: &Machines, name: &str) -> Result<()> {
        self.0 += &state.ok(&format!("logs {name}"))?;
        state.ok(&format!("rm {name}"))?;
        Ok(())
    }

    /// The numbers of the lines that begin with `word`.
    fn numbers(&self, word: &str) -> Result<Vec<Vec<u64>>> {
        let lines = self.0.lines().filter_map(|line| line.trim().strip_prefix(word));
        lines
            .map(|line| {
                let numbers = line.trim().split([' ', ';']).map(str::parse).collect::<Result<_, _>>();
                numbers.with_context(|| format!("'{word}{line}'"))
            })
            .collect()
    }
}

/// Lets the guest go on in another machine. How it is saved, and how it gets its memory, is another way each time.
fn go(state: &Machines, losses: &mut Losses, number: u32) -> Result<()> {
    let (from, to) = (format!("m{number}"), format!("m{}", number + 1));
    let how = match number % 8 {
        0 => "",
        // To what was saved while it ran.
        7 => {
            state.ok(&format!("snapshot {from} --to live{number}"))?;
            losses.until_all_went_on()?;
            "--diff"
        }
        // To what it was restored from, which is full first, and then a diff.
        _ => "--diff",
    };
    let memory = ["map", "copy", "uffd"][number as usize % 3];
    state.ok(&format!("snapshot {from} --to s{number} --stop {how}"))?;
    state.ok(&format!("restore s{number} --detach --name {to} --memory-mode {memory}"))?;
    // Those that the machines before this one needed.
    if how.is_empty() {
        for entry in fs::read_dir(state.dir())? {
            let path = entry?.path();
            if path.join("manifest.json").exists() && !path.ends_with(format!("s{number}")) {
                fs::remove_dir_all(path)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_guest_under_load_that_moves_fifty_times_loses_nothing() -> Result<()> {
    let net = NetNs::new(&Place::choose(Needs::AnyKvm)?)?;
    let mut losses = Losses::start(&net)?;
    let state = Machines::new(env!("CARGO_BIN_EXE_vmm"))?.within(&net);
    File::create(state.dir().join("data.img"))?.set_len(16 << 20)?;
    let root = tools_image()?;
    state.shell(
        &format!(
            "run -q --detach --name m0 --track-dirty --memory 192M --rootfs {},ro --disk data.img --net tap={TAP} \
             --append ip={GUEST_ADDRESS}::{HOST_ADDRESS}:255.255.255.0::eth0:off",
            root.display()
        ),
        &LOAD.replace("ADDRESS", &format!("{HOST_ADDRESS}:{PORT}")),
    )?;
    losses.process.expect("connected", DEADLINE)?;
    let (mut console, mut behind) = (Console(String::new()), Vec::new());
    for number in 0..=MOVES {
        let name = format!("m{number}");
        losses
            .until_all_went_on()
            .and_then(|()| if number < MOVES { go(&state, &mut losses, number) } else { Ok(()) })
            .with_context(|| {
                let (log, all) = (state.ok(&format!("logs {name}")), state.ok("ps --format json"));
                format!("{name}: {log:?} {all:?}")
            })?;
        behind.push(std::mem::replace(&mut losses.behind, [i64::MIN, i64::MAX]));
        if number < MOVES {
            console.add(&state, &name)?;
        }
    }
    clocks_went_on(&behind)?;
    // The end of its input is the end of all.
    losses.process.close_stdin();
    let name = format!("m{MOVES}");
    let ended = state.output(&format!("wait {name}"))?;
    console.add(&state, &name)?;
    ensure!(ended.status.success(), "{ended:?}: {}", console.0);

    let here = losses.process.wait(DEADLINE)?.ok()?;
    let here = here.lines().find_map(|line| line.strip_prefix("sent and received: ")).context("it says")?;
    let there = console.numbers("losses: ")?;
    let [sent, received, passes, ticks, backwards] = there.first().context("it says")?[..] else {
        bail!("{there:?}")
    };
    ensure!(here == format!("{received} {sent}"), "here {here}, there {there:?}");
    ensure!(backwards == 0 && sent > 0 && received > 0 && passes > MOVES.into(), "{there:?}");
    let lines = console.numbers("tick ")?;
    ensure!(lines.len() as u64 == ticks && ticks > MOVES.into(), "{} of {ticks} lines", lines.len());
    let wrong = lines.iter().zip(1..).find(|(line, number)| line[0] != *number);
    ensure!(wrong.is_none(), "{wrong:?}");
    let fio = console.numbers("fio: ")?;
    ensure!(!fio.is_empty() && fio.iter().all(|sums| sums.iter().all(|&sum| sum > 0)), "{fio:?}");
    println!("{there:?} {fio:?} {:?}", behind.iter().map(|[least, most]| most - least).max());
    Ok(())
}
