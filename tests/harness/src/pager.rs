//! A program that brings a restored guest's memory in, as clients of Firecracker have one: here it is a thread of the test.
#![allow(unsafe_code, reason = "pages are put into another process's memory, by address")]

use std::collections::HashSet;
use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::Deserialize;

const PAGE: u64 = 4096;

/// Where a piece of memory is, in Firecracker's words.
#[derive(Debug, Deserialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

const COPY: Opcode = opcode::read_write::<Copy>(0xaa, 3);

/// A thread that serves one guest.
pub struct Pager(JoinHandle<Result<usize>>);

impl Pager {
    /// Listens at `socket`, and brings the pages of the file `memory` into whoever connects. It ends after `most` pages, or
    /// when the guest's process does.
    pub fn listen(socket: &Path, memory: &Path, most: usize) -> Result<Self> {
        _ = std::fs::remove_file(socket);
        let (listener, memory) = (UnixListener::bind(socket)?, File::open(memory)?);
        Ok(Self(std::thread::spawn(move || serve(&listener.accept()?.0, &memory, most))))
    }

    /// Waits for its end. Returns how many pages it has brought in.
    pub fn wait(self) -> Result<usize> {
        self.0.join().map_err(|_| anyhow::anyhow!("the pager panicked"))?
    }
}

fn serve(socket: &UnixStream, memory: &File, most: usize) -> Result<usize> {
    let (fault, mappings) = receive(socket)?;
    ensure!(mappings.iter().all(|mapping| mapping.page_size == PAGE), "{mappings:?}");
    let (mut removed, mut served) = (HashSet::new(), 0);
    while served < most {
        let mut fds = [PollFd::new(&fault, PollFlags::IN), PollFd::new(socket, PollFlags::IN)];
        poll(&mut fds, None)?;
        if fds[1].revents().contains(PollFlags::HUP) {
            break;
        }
        let mut message = [0_u8; 32];
        match rustix::io::read(&fault, &mut message) {
            Err(Errno::AGAIN) => continue,
            read => ensure!(read? == message.len(), "half a message"),
        }
        let number = |at: usize| message[at..at + 8].try_into().map(u64::from_ne_bytes);
        match message[0] {
            0x12 => {
                let page = number(16)? / PAGE * PAGE;
                let inside = |mapping: &&Mapping| {
                    (mapping.base_host_virt_addr..mapping.base_host_virt_addr + mapping.size).contains(&page)
                };
                let mapping = mappings.iter().find(inside).context("a fault outside of memory")?;
                let mut bytes = [0; PAGE as usize];
                if !removed.contains(&page) {
                    memory.read_exact_at(&mut bytes, page - mapping.base_host_virt_addr + mapping.offset)?;
                }
                if !bring(&fault, page, &bytes)? {
                    break;
                }
                served += 1;
            }
            0x15 => removed.extend((number(8)?..number(16)?).step_by(PAGE as usize)),
            other => bail!("event {other:#x}"),
        }
    }
    Ok(served)
}

/// Puts a page there. False if the process is gone.
fn bring(fault: &OwnedFd, page: u64, bytes: &[u8]) -> Result<bool> {
    loop {
        let mut copy = Copy { dst: page, src: bytes.as_ptr() as u64, len: PAGE, mode: 0, copy: 0 };
        // SAFETY: the structure is the one that this call reads and fills, and `bytes` are a page.
        match unsafe { ioctl(fault, Updater::<COPY, Copy>::new(&mut copy)) } {
            // Somebody else waited for it, too.
            Ok(()) | Err(Errno::EXIST) => return Ok(true),
            Err(Errno::SRCH) => return Ok(false),
            Err(Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn receive(socket: &UnixStream) -> Result<(OwnedFd, Vec<Mapping>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut text = vec![0; 4096];
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fault = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let mappings = serde_json::from_slice(&text[..received.bytes])?;
    Ok((fault.context("no descriptor")?, mappings))
}
