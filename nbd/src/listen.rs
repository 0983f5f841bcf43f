//! Listening sockets: what may be bound, and the care for a unix socket's path.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::server::Config;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket at this path; its mode is [`Config::socket_mode`].
    Unix(PathBuf),
    /// TCP; loopback only, unless [`Config::is_remote_allowed`]: whoever connects can read and write.
    Tcp(SocketAddr),
}

/// Why a server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another server answers at the path.
    #[error("{0} is the socket of a running server")]
    InUse(PathBuf),
    /// Something that is not a socket is at the path; it is left alone.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// NBD without TLS to the network has to be asked for.
    #[error("{0} is not a loopback address, and remote clients are not allowed")]
    NotLoopback(SocketAddr),
    /// A bound too small to serve any client.
    #[error("{name} is {value}, it has to be at least {least}")]
    Bound {
        /// Field of [`Config`].
        name: &'static str,
        /// As configured.
        value: u64,
        /// As needed.
        least: u64,
    },
    /// The system said no.
    #[error("cannot {what} {target}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Path or address.
        target: String,
        /// The system's answer.
        error: io::Error,
    },
}

/// A bound socket, not blocking.
#[derive(Debug)]
pub(crate) enum Listener {
    Unix(UnixListener, SocketFile),
    Tcp(TcpListener, SocketAddr),
}

/// A socket's path; the file goes with it.
#[derive(Debug)]
pub(crate) struct SocketFile {
    pub path: PathBuf,
    /// Device and inode: a file that took our place at the path is not ours to remove.
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the socket's file stays behind");
        }
    }
}

pub(crate) fn listen(address: &Address, config: &Config) -> Result<Listener, BindError> {
    match address {
        Address::Unix(path) => listen_unix(path, config.socket_mode),
        Address::Tcp(address) if !address.ip().is_loopback() && !config.is_remote_allowed => {
            Err(BindError::NotLoopback(*address))
        }
        Address::Tcp(address) => listen_tcp(*address),
    }
}

fn listen_unix(path: &Path, mode: u32) -> Result<Listener, BindError> {
    let failed = |what| {
        move |error| BindError::Io {
            what,
            target: path.display().to_string(),
            error,
        }
    };
    remove_stale(path)?;
    let listener = UnixListener::bind(path).map_err(failed("bind"))?;
    let file = SocketFile {
        path: path.to_owned(),
        identity: identity(path).map_err(failed("look at"))?,
    };
    // Until here the umask ruled, which lets no one connect but ourselves on any usual system.
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed("set the mode of"))?;
    listener.set_nonblocking(true).map_err(failed("configure"))?;
    Ok(Listener::Unix(listener, file))
}

/// Makes place at the path if what is there is a socket that no one answers at: the leftover of a crash.
fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |what, error| BindError::Io {
        what,
        target: path.display().to_string(),
        error,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at", error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(BindError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(BindError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| failed("remove the stale", error))
        }
        Err(error) => Err(failed("see who is at", error)),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn listen_tcp(address: SocketAddr) -> Result<Listener, BindError> {
    let failed = |error| BindError::Io {
        what: "bind",
        target: address.to_string(),
        error,
    };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    Ok(Listener::Tcp(listener, local))
}
