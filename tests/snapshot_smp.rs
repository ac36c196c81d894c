//! Snapshots of guests with two CPUs, ACPI and either transport: all of theirs goes on, on both, and in clones of clones.

mod hardware {
    use std::collections::HashSet;

    use anyhow::{Result, ensure};
    use harness::{Kernel, Needs, Place, PlacedMachines, binaries, initramfs_with, report};
    use tempfile::NamedTempFile;

    /// Process 1 of the guests, and what becomes of it. It is not our init: after a restore, the lab's emulation refuses programs
    /// the I/O ports by which that hears of being a clone.
    const GUEST: &str = "#!/bin/sh
for what in proc sysfs:sys devtmpfs:dev; do busybox mount -t ${what%:*} none /${what#*:}; done
peer serve vsock:5000 > /dev/null &
exec peer rounds vda
";
    /// By how many seconds a wall clock may be wrong: the host's is read as whole seconds, and some time before or after.
    const TOLERANCE: u64 = 2;

    /// What a guest says of itself in one line, as `peer rounds` has it.
    #[derive(Clone, Debug)]
    struct Line {
        /// Its clocks in nanoseconds.
        wall: u64,
        monotonic: u64,
        /// How often a CPU has seen one of them go backwards.
        backwards: u64,
        random: String,
        /// How often its kernel has noticed that it is a clone.
        generations: u32,
        /// What each CPU has done: rounds with the disk, and interrupts of its timer and of the disk.
        done: [[u64; 2]; 3],
    }

    impl Line {
        /// `None` for any other line, and for one that the kernel's own output is in.
        fn parse(line: &str) -> Option<Self> {
            let words: Vec<&str> = line.trim().strip_prefix("rounds: ")?.split(' ').collect();
            let [wall, monotonic, backwards, random, generations, rounds, timer, disk] = words[..] else {
                return None;
            };
            let pair = |text: &str| {
                let (first, second) = text.split_once(',')?;
                Some([first.parse().ok()?, second.parse().ok()?])
            };
            Some(Self {
                wall: wall.parse().ok()?,
                monotonic: monotonic.parse().ok()?,
                backwards: backwards.parse().ok()?,
                random: random.into(),
                generations: generations.parse().ok()?,
                done: [pair(rounds)?, pair(timer)?, pair(disk)?],
            })
        }

        /// Both CPUs have done something of everything since.
        fn has_all_since(&self, before: &Self) -> bool {
            self.done.as_flattened().iter().zip(before.done.as_flattened()).all(|(now, was)| now > was)
        }
    }

    /// A machine, as far as it is known.
    #[derive(Clone)]
    struct Machine {
        name: String,
        /// When it was asked for, in seconds since 1970 where it is.
        begun: u64,
        /// The last that is known of what it, or the one that it goes on from, has said.
        said: Option<Line>,
        /// How many lines of its own were looked at.
        seen: usize,
        /// By how many restores it is away from its boot.
        generations: u32,
    }

    /// Where such guests are.
    struct Guests {
        machines: PlacedMachines,
        peer: String,
    }

    impl Guests {
        /// Boots one.
        fn boot(transport: &str) -> Result<(Self, Machine)> {
            // A lab ends that waits long for what is built first.
            let (peer, kernel) = (binaries::stream_peer()?, Kernel::Standard.file()?);
            binaries::vmm()?;
            let (init, initrd) = (NamedTempFile::new()?, NamedTempFile::new()?);
            std::fs::write(&init, GUEST)?;
            std::fs::write(&initrd, initramfs_with(&[("guest", init.path()), ("peer", &peer)])?)?;
            let place = Place::choose(Needs::Hardware)?;
            report::check_module(Needs::Hardware)?;
            report::boots(&Kernel::Standard.describe(), &place)?;
            let (kernel, initrd) = (place.provide(&kernel)?, place.provide(initrd.path())?);
            let guests = Self { machines: PlacedMachines::new(&place)?, peer: place.provide(&peer)? };
            guests.machines.files().shell("truncate -s 1M disk")?;
            let machine = guests.machine("web", None)?;
            guests.machines.ok(&format!(
                "run -q --name web --detach --cpus 2 --memory 128M --transport {transport} --track-dirty --kernel {kernel} \
                 --initrd {initrd} --no-rootfs --append rdinit=/bin/guest --disk disk --vsock vsock"
            ))?;
            Ok((guests, machine))
        }

        /// A machine that is about to be.
        fn machine(&self, name: &str, parent: Option<&Machine>) -> Result<Machine> {
            Ok(Machine {
                name: name.into(),
                begun: self.now()?,
                said: parent.and_then(|parent| parent.said.clone()),
                seen: 0,
                generations: parent.map_or(0, |parent| parent.generations + 1),
            })
        }

        fn restore(&self, dir: &str, parent: &Machine, name: &str) -> Result<Machine> {
            let machine = self.machine(name, Some(parent))?;
            self.machines.ok(&format!("restore {dir} --name {name} --detach --track-dirty"))?;
            Ok(machine)
        }

        fn fork(&self, parent: &Machine, count: usize) -> Result<Vec<Machine>> {
            let machine = self.machine("", Some(parent))?;
            let names = self.machines.ok(&format!("fork {} -n {count}", parent.name))?;
            Ok(names.lines().map(|name| Machine { name: name.into(), ..machine.clone() }).collect())
        }

        fn kill(&self, machine: Machine) -> Result<()> {
            self.machines.ok(&format!("kill {}", machine.name)).map(drop)
        }

        /// Seconds since 1970 where the guests are.
        fn now(&self) -> Result<u64> {
            Ok(self.machines.files().shell("date +%s")?.trim().parse()?)
        }

        /// Waits until both CPUs of a machine have gone on with all that they do, and its kernel knows whose clone it is.
        /// Returns a random number of its own.
        fn goes_on(&self, machine: &mut Machine) -> Result<String> {
            let Machine { name, begun, said, seen, generations } = machine;
            let (number, line) = self.machines.find_in_log(name, |log| {
                ensure!(["wrong", "BUG", "WARNING"].iter().all(|word| !log.contains(word)));
                let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
                let lines: Vec<Line> = whole.lines().filter_map(Line::parse).skip(*seen).collect();
                let in_order: Vec<&Line> = said.iter().chain(&lines).collect();
                for two in in_order.windows(2) {
                    ensure!(two[0].monotonic < two[1].monotonic && two[1].backwards == 0, "{two:?}");
                }
                // Compared with its own first line, since its parent went on after its last one that is known.
                let went_on =
                    |line: &&Line| line.generations == *generations && line.has_all_since(&lines[0]);
                Ok(lines
                    .iter()
                    .zip(*seen..)
                    .find(|(line, _)| went_on(line))
                    .map(|(line, i)| (i, line.clone())))
            })?;
            let wall = line.wall / 1_000_000_000;
            let right = *begun - TOLERANCE..=self.now()? + TOLERANCE;
            ensure!(
                right.contains(&wall),
                "{name}: the wall clock is {wall}, and should be in {right:?}: {line:?}"
            );
            let random = line.random.clone();
            (*said, *seen) = (Some(line), number + 1);
            Ok(random)
        }

        /// Has words come back from the program that listens in a clone.
        fn answers(&self, machine: &Machine) -> Result<()> {
            let socket = self.machines.path_of(&machine.name, "vsock.sock");
            let said = self.machines.files().shell(&format!("{} echo guest:{socket}:5000 3", self.peer))?;
            ensure!(said.trim() == "echo: 3 connections", "{}: {said}", machine.name);
            Ok(())
        }
    }

    /// A snapshot, a diff to what was restored from it, and a fork of what was restored from that.
    fn all_goes_on(transport: &str) -> Result<()> {
        let (guests, mut web) = Guests::boot(transport)?;
        let mut random = vec![guests.goes_on(&mut web)?];
        guests.machines.ok("snapshot web --to full")?;
        let mut first = guests.restore("full", &web, "first")?;
        random.push(guests.goes_on(&mut first)?);
        random.push(guests.goes_on(&mut web)?);
        guests.answers(&first)?;
        guests.kill(web)?;

        guests.machines.ok("snapshot first --to diff --diff")?;
        let mut second = guests.restore("diff", &first, "second")?;
        random.push(guests.goes_on(&mut second)?);
        guests.kill(first)?;

        let mut clones = guests.fork(&second, 3)?;
        ensure!(clones.len() == 3, "{} clones", clones.len());
        for clone in &mut clones {
            random.push(guests.goes_on(clone)?);
            guests.answers(clone)?;
        }
        random.push(guests.goes_on(&mut second)?);
        ensure!(random.iter().collect::<HashSet<_>>().len() == random.len(), "one twice: {random:?}");
        Ok(())
    }

    #[test]
    fn all_of_a_guest_goes_on_in_clones_of_clones_on_mmio() -> Result<()> {
        all_goes_on("mmio")
    }

    #[test]
    fn all_of_a_guest_goes_on_in_clones_of_clones_on_pci() -> Result<()> {
        all_goes_on("pci")
    }
}
