//! Streams between a guest and this side of it: the stream peer, which is a program in the guest and beside the VMM.

use std::time::Duration;

use anyhow::Result;
use tempfile::NamedTempFile;

use crate::scratch::Scratch;
use crate::{Guest, Needs, Place, Process, Program, binaries, initramfs_with};

/// Only there to end a hang.
const DEADLINE: Duration = Duration::from_secs(120);

/// A directory for sockets, the peer beside it, and an initramfs that has it too.
pub struct StreamPeer {
    dir: Scratch,
    program: String,
    initramfs: NamedTempFile,
}

impl StreamPeer {
    /// A directory of a test's own at the best place.
    pub fn new() -> Result<Self> {
        let place = Place::choose(Needs::AnyKvm)?;
        let binary = binaries::stream_peer()?;
        let initramfs = NamedTempFile::new()?;
        std::fs::write(initramfs.path(), initramfs_with(&[("peer", &binary)])?)?;
        let program = place.provide(&binary)?;
        Ok(Self { dir: Scratch::new(&place)?, program, initramfs })
    }

    /// Where it is.
    pub fn place(&self) -> &Place {
        self.dir.place()
    }

    /// A path in the directory.
    pub fn path(&self, name: &str) -> String {
        self.dir.path(name)
    }

    /// A guest with the peer in it, whose root file system is the initramfs.
    pub fn guest(&self) -> Guest<'static> {
        Guest::new().initrd(self.initramfs.path()).deadline(DEADLINE)
    }

    /// Starts the peer beside the guest.
    pub fn start(&self, arguments: &[&str]) -> Result<Process> {
        self.place().start(&Program::new([self.program.as_str()].iter().chain(arguments).copied()))
    }

    /// When to give up waiting for it.
    pub fn deadline(&self) -> Duration {
        DEADLINE * self.place().slowness()
    }
}
