//! What an operator says about a socket device.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Vsock, listener};
use crate::model::{DeviceKind, MachineShape, OpenError, VirtioDevice};
use crate::throttle::{Limits, TokenBucket};

/// Configuration of a socket device.
///
/// ```
/// use devices::{params, virtio::vsock::Config};
///
/// let config: Config = params::from_str("/run/web.sock,cid=7", Some("path"))?;
/// assert!(config.cid == 7);
/// # Ok::<(), params::ParamError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where host programs connect, and the start of the paths of those that the guest connects to.
    pub path: PathBuf,
    /// The guest's CID.
    #[serde(default = "default_cid")]
    pub cid: u32,
    /// Limit in bytes, both ways together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Limit in packets, both ways together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// The first that is free for guests.
fn default_cid() -> u32 {
    3
}

impl DeviceKind for Config {
    const NAME: &'static str = "vsock";
    const SYNTAX: &'static str = "path=SOCKET[,cid=NUMBER][,bandwidth=LIMIT][,ops=LIMIT]";
    const HELP: &'static str = "Sockets between host (unix sockets at this path) and guest (vsock)";
    const BARE_KEY: Option<&'static str> = Some("path");
    const SINGLE: bool = true;
    const HOST: &'static [&'static str] = &["path", "cid"];

    fn open(&self, _: &MachineShape) -> Result<Box<dyn VirtioDevice>, OpenError> {
        if matches!(self.cid, 0..=2 | u32::MAX) {
            let problem = format!("cid {} is reserved; use one from 3 to {}", self.cid, u32::MAX - 1);
            return Err(Self::refused(problem));
        }
        Ok(Box::new(Vsock::new(listener::listen(&self.path)?, self.cid.into())?))
    }

    fn limits(&self) -> Vec<Limits> {
        vec![Limits { bandwidth: self.bandwidth, ops: self.ops }]
    }

    /// A device that is its own host program: its guest's calls come in as calls from the host.
    #[cfg(any(test, feature = "specimen"))]
    fn specimen() -> Box<dyn VirtioDevice> {
        use crate::virtio::unix_listener::UnixListener;
        Box::new(Vsock::new(UnixListener::abstract_name(), 3).expect("a poller"))
    }
}
