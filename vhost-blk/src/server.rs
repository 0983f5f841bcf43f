//! A device's socket: one frontend after the other, for ever.
//!
//! ```text
//!  listen ─▶ accept ─▶ serve (relay + protocol crate) ─▶ frontend gone: rings stop, drain ─▶ accept …
//!                                  stop() ends any of these
//! ```
//!
//! A second frontend waits in the socket's backlog until the first is gone. A virtual machine's reboot drops the
//! connection and makes another, so that is the normal course.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::GuestMemoryMmap;

use crate::api::{DeviceConfig, DeviceId, Plane, VhostError};
use crate::device::Device;
use crate::relay::{self, End};
use crate::ring::lock;
use crate::session::{Session, SessionBackend};
use crate::vring::{AtomicMemory, with_session};

/// Owner and group may connect: a VMM usually runs as another user of one group.
const SOCKET_MODE: u32 = 0o660;

/// The socket between relay and protocol crate is ours alone.
const INNER_MODE: u32 = 0o600;

/// How long to wait before accepting again when the process has no file descriptor left.
const ACCEPT_RETRY: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// A device that frontends can connect to. Dropping it is [`Server::stop`].
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    device: Arc<Device>,
    plane: Arc<dyn Plane>,
    path: PathBuf,
    /// Of the socket we bound, so that a successor's is not taken away.
    inode: u64,
    stop: OwnedFd,
    /// The frontend being served.
    session: Mutex<Option<Arc<Session>>>,
}

impl Server {
    /// Listens at `path`. A socket that nobody serves any more is replaced.
    ///
    /// # Errors
    /// [`VhostError::Config`] for a contradictory configuration, [`VhostError::SocketInUse`] and
    /// [`VhostError::NotASocket`] for what is at `path`, [`VhostError::Io`] for what the system refuses.
    pub fn start(
        path: &Path,
        id: DeviceId,
        config: DeviceConfig,
        plane: Arc<dyn Plane>,
    ) -> Result<Server, VhostError> {
        config.check()?;
        check_vacant(path)?;
        let io = |action| {
            move |source| VhostError::Io {
                action,
                path: path.to_owned(),
                source,
            }
        };
        let new = suffixed(path, ".new");
        let _ = fs::remove_file(&new);
        let listener = listen(&new, SOCKET_MODE).map_err(io("listening at"))?;
        listener.set_nonblocking(true).map_err(io("listening at"))?;
        let inode = fs::metadata(&new).map_err(io("looking at"))?.ino();
        // Only now, with its final permissions and somebody to answer, does the socket get its name.
        fs::rename(&new, path).map_err(io("naming"))?;
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| io("an eventfd for")(error.into()))?;
        let shared = Arc::new(Shared {
            device: Arc::new(Device::new(id, config)),
            plane,
            path: path.to_owned(),
            inode,
            stop,
            session: Mutex::new(None),
        });
        let thread = std::thread::Builder::new()
            .name(format!("vhost-{}", id.0))
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.accept_for_ever(&listener)
            })
            .map_err(io("a thread for"))?;
        Ok(Server {
            shared,
            thread: Some(thread),
        })
    }

    /// The socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Whether a frontend is connected now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        lock(&self.shared.session).is_some()
    }

    /// The disk has another size, a multiple of the sector. Requests are held against it from now on; a connected
    /// guest is told, if its frontend takes such news.
    ///
    /// # Panics
    /// When `bytes` is not whole sectors.
    pub fn resize(&self, bytes: u64) {
        let sector = u64::from(self.shared.device.config.sector_bytes);
        assert!(
            bytes.is_multiple_of(sector),
            "{bytes} bytes are not whole sectors of {sector}"
        );
        self.shared.device.resize(bytes);
        let session = lock(&self.shared.session).clone();
        if let Some(session) = session {
            session.tell_config_changed();
        }
    }

    /// Disconnects the frontend, waits until the plane has dropped the rings, and takes the socket away. Not to be
    /// called on the plane's own thread, which would wait for itself.
    pub fn stop(mut self) {
        self.stop_now();
    }

    fn stop_now(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        rustix::io::write(&self.shared.stop, &1u64.to_ne_bytes()).expect("an eventfd takes a one");
        if thread.join().is_err() {
            tracing::error!(path = %self.shared.path.display(), "the server's thread panicked");
        }
        let is_ours = fs::metadata(&self.shared.path).is_ok_and(|meta| meta.ino() == self.shared.inode);
        if is_ours {
            let _ = fs::remove_file(&self.shared.path);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop_now();
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("path", &self.shared.path)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn accept_for_ever(&self, listener: &UnixListener) {
        while !self.wait(Some(listener), None) {
            match listener.accept() {
                Ok((client, _)) => self.serve(&client),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(path = %self.path.display(), %error, "accepting a frontend");
                    if self.wait(None, Some(&ACCEPT_RETRY)) {
                        return;
                    }
                }
            }
        }
    }

    /// Waits for a frontend, for a time or for the stop; whether it is the stop.
    fn wait(&self, listener: Option<&UnixListener>, timeout: Option<&Timespec>) -> bool {
        let mut ready = vec![PollFd::new(&self.stop, PollFlags::IN)];
        ready.extend(listener.map(|listener| PollFd::new(listener, PollFlags::IN)));
        let result = rustix::event::poll(&mut ready, timeout);
        result.is_ok() && !ready[0].revents().is_empty()
    }

    fn serve(&self, client: &UnixStream) {
        let session = Arc::new(Session::new(Arc::clone(&self.device), Arc::clone(&self.plane)));
        *lock(&self.session) = Some(Arc::clone(&session));
        tracing::info!(path = %self.path.display(), "frontend connected");
        let end = self.converse(client, &session);
        *lock(&self.session) = None;
        session.end();
        match end {
            Ok((End::Client | End::Stop, _)) => {
                tracing::info!(path = %self.path.display(), "frontend gone");
            }
            Ok((end, protocol)) => {
                tracing::warn!(path = %self.path.display(), ?end, ?protocol, "frontend disconnected");
            }
            Err(error) => tracing::error!(path = %self.path.display(), %error, "frontend not served"),
        }
    }

    /// The whole of a connection. Its end is told by both sides: the relay's, and the protocol crate's complaint.
    fn converse(&self, client: &UnixStream, session: &Arc<Session>) -> io::Result<(End, Option<String>)> {
        let memory = AtomicMemory::new(GuestMemoryMmap::new());
        let backend = SessionBackend(Arc::clone(session));
        let name = format!("vhost-{}-io", self.device.id.0);
        let mut daemon = with_session(session, || VhostUserDaemon::new(name, backend, memory))
            .map_err(|error| io::Error::other(error.to_string()))?;

        let inner_path = suffixed(&self.path, ".own");
        let _ = fs::remove_file(&inner_path);
        let listener = listen(&inner_path, INNER_MODE)?;
        let inner = UnixStream::connect(&inner_path);
        let _ = fs::remove_file(&inner_path);
        let inner = inner?;
        daemon
            .start(&mut Listener::from(listener))
            .map_err(|error| io::Error::other(error.to_string()))?;

        let end = relay::run(client, &inner, self.stop.as_fd(), |channel| {
            session.set_channel(channel);
        });
        drop(inner);
        let protocol = daemon.wait().err().map(|error| error.to_string());
        Ok((end, protocol))
    }
}

/// Suffixes are of one length: a path that is too long fails when the server starts, not when a guest comes.
fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// A listening socket at `path`, which must be free. Nobody can connect before its mode is set.
fn listen(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    rustix::net::listen(&socket, 16)?;
    Ok(UnixListener::from(socket))
}

/// Refuses a path that something lives at.
fn check_vacant(path: &Path) -> Result<(), VhostError> {
    let Ok(meta) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !meta.file_type().is_socket() {
        return Err(VhostError::NotASocket(path.to_owned()));
    }
    match probe(path) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(()),
        Ok(()) | Err(_) => Err(VhostError::SocketInUse(path.to_owned())),
    }
}

/// Connects and hangs up. Does not wait: a live server's backlog may be full.
fn probe(path: &Path) -> Result<(), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}
