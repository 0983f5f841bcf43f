//! The server: accepts clients up to a bound, and ends in good order.

use std::io;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::connection::{self, Ended, PERMIT_BYTES, Stream, became_true};
use crate::export::{Export, Exports};
use crate::listen::{Address, BindError, Listener, SocketFile, listen};
use crate::proto::PAYLOAD_BYTES_MAX;

/// After an accept that failed for want of descriptors or memory: trying at once would only burn a CPU.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A TCP client that has been silent this long is probed, so that a vanished one does not keep its place.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);

/// The server's bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Clients at once, those in the handshake included; further ones are hung up on.
    pub connections_max: usize,
    /// Requests of one connection at once.
    pub requests_max: usize,
    /// Bytes of content of one connection's requests and replies at once; at least 32 MiB, the largest request.
    pub bytes_max: u32,
    /// A client that has not chosen an export by then is hung up on.
    pub handshake_timeout: Duration,
    /// What requests in flight are given to finish in when the server stops, their export is removed, or their
    /// client has left.
    pub grace: Duration,
    /// Permission bits of a unix socket.
    pub socket_mode: u32,
    /// TCP addresses other than loopback may be bound. There is no TLS and no login: the network has to be
    /// trusted.
    pub is_remote_allowed: bool,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            connections_max: 64,
            requests_max: 128,
            bytes_max: PAYLOAD_BYTES_MAX,
            handshake_timeout: Duration::from_secs(10),
            grace: Duration::from_secs(10),
            socket_mode: 0o660,
            is_remote_allowed: false,
        }
    }
}

impl Config {
    fn check(&self) -> Result<(), BindError> {
        let bounds = [
            ("connections_max", self.connections_max as u64, 1),
            ("requests_max", self.requests_max as u64, 1),
            (
                "bytes_max",
                u64::from(self.bytes_max),
                u64::from(PAYLOAD_BYTES_MAX),
            ),
        ];
        for (name, value, least) in bounds {
            if value < least {
                return Err(BindError::Bound { name, value, least });
            }
        }
        const { assert!(PAYLOAD_BYTES_MAX.is_multiple_of(PERMIT_BYTES)) };
        Ok(())
    }
}

/// A listening server. Dropping it hangs up on everyone; [`stop`](Server::stop) is the polite way.
#[derive(Debug)]
pub struct Server {
    address: Address,
    is_stopped: watch::Sender<bool>,
    accepting: JoinSet<()>,
}

impl Server {
    /// Listens: clients can connect once this returns. To be called inside a tokio runtime, on which everything
    /// runs. A unix socket at which no one answers is replaced.
    ///
    /// # Errors
    /// The address is in use, is not allowed, or the system refuses it; a bound of `config` is too small.
    pub fn bind<E: Export>(
        address: &Address,
        exports: Exports<E>,
        config: Config,
    ) -> Result<Server, BindError> {
        config.check()?;
        let listener = listen(address, &config)?;
        let is_stopped = watch::Sender::new(false);
        let clients = Clients {
            exports,
            config,
            is_stopped: is_stopped.subscribe(),
            tasks: JoinSet::new(),
        };
        let mut accepting = JoinSet::new();
        let failed = |error| BindError::Io {
            what: "watch",
            target: format!("{address:?}"),
            error,
        };
        let address = match listener {
            Listener::Unix(listener, file) => {
                let address = Address::Unix(file.path.clone());
                let listener = UnixListener::from_std(listener).map_err(failed)?;
                accepting.spawn(clients.accept(Unix(listener, file)));
                address
            }
            Listener::Tcp(listener, address) => {
                let listener = TcpListener::from_std(listener).map_err(failed)?;
                accepting.spawn(clients.accept(listener));
                Address::Tcp(address)
            }
        };
        Ok(Server {
            address,
            is_stopped,
            accepting,
        })
    }

    /// Where it listens: with the port that the system chose, if it was asked to.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Accepts no one any more, removes the socket's file, lets every connection finish the requests it has in
    /// flight (at most [`Config::grace`]; those that take longer are dropped) and closes it.
    pub async fn stop(mut self) {
        self.is_stopped.send_replace(true);
        while let Some(result) = self.accepting.join_next().await {
            if let Err(error) = result {
                tracing::error!(%error, "the acceptor did not end well");
            }
        }
    }
}

/// A listener of either kind; dropping it closes the socket and removes its file.
trait Accept: Send + 'static {
    type Stream: Stream;
    fn accept(&mut self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

struct Unix(
    UnixListener,
    #[expect(dead_code, reason = "lives as long as the listener")] SocketFile,
);

impl Accept for Unix {
    type Stream = tokio::net::UnixStream;

    async fn accept(&mut self) -> io::Result<Self::Stream> {
        Ok(self.0.accept().await?.0)
    }
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn accept(&mut self) -> io::Result<TcpStream> {
        let (stream, _) = TcpListener::accept(self).await?;
        // Replies are batched already; waiting for more to send only adds latency.
        stream.set_nodelay(true)?;
        sockopt::set_socket_keepalive(&stream, true)?;
        sockopt::set_tcp_keepidle(&stream, KEEPALIVE_IDLE)?;
        Ok(stream)
    }
}

/// The connected clients, and what each is given.
struct Clients<E> {
    exports: Exports<E>,
    config: Config,
    is_stopped: watch::Receiver<bool>,
    tasks: JoinSet<Result<(), Ended>>,
}

impl<E: Export> Clients<E> {
    /// Accepts clients until the server stops, then waits for the last to leave.
    async fn accept<A: Accept>(mut self, mut listener: A) {
        let mut is_stopped = self.is_stopped.clone();
        loop {
            tokio::select! {
                () = became_true(&mut is_stopped) => break,
                Some(result) = self.tasks.join_next() => log_end(result),
                accepted = listener.accept() => match accepted {
                    Ok(stream) => self.admit(stream),
                    Err(error) => {
                        tracing::warn!(%error, "a client could not be accepted");
                        sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(listener);
        while let Some(result) = self.tasks.join_next().await {
            log_end(result);
        }
    }

    fn admit<S: Stream>(&mut self, stream: S) {
        let limit = self.config.connections_max;
        if self.tasks.len() >= limit {
            tracing::warn!(limit, "a client is hung up on: as many as allowed are connected");
            return;
        }
        let serve = connection::serve(stream, self.exports.clone(), self.config, self.is_stopped.clone());
        self.tasks.spawn(serve);
    }
}

fn log_end(result: Result<Result<(), Ended>, tokio::task::JoinError>) {
    match result {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::info!(%error, "a client's connection was cut"),
        Err(error) => tracing::error!(%error, "a connection's task did not end well"),
    }
}
