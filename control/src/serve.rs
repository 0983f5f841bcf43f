//! Connections to the REST socket: so many at once, and none that keeps its place without saying anything.
//!
//! `axum::serve` has no bound on connections and gives a request's head for ever to arrive; the socket is its
//! owner's alone, but a script that forgets to close what it opens would take the daemon's file descriptors.

use std::future::Future;
use std::io;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Connections at once; further ones are answered with 503.
pub const CONNECTIONS_MAX: usize = 128;
/// What a request's head, and then its body, is given to arrive in; an idle connection is closed after it too.
pub const REQUEST_WAIT: Duration = Duration::from_secs(10);
/// Longest head of a request.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// After an accept that failed for want of descriptors or memory: trying at once would only burn a CPU.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const TOO_MANY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\n\
    connection: close\r\n\r\n{\"code\":\"unavailable\",\"message\":\"as many connections as allowed are open\",\
    \"hint\":\"close some, or try again in a moment\"}";

/// Serves `router` on `listener` until `stop` is ready and the requests under way are answered.
///
/// # Errors
/// The listener's.
pub async fn serve(
    listener: UnixListener,
    router: Router,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let mut connections = JoinSet::new();
    let stopping = watch::Sender::new(false);
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if connections.len() >= CONNECTIONS_MAX => refuse(&stream),
                Ok((stream, _)) => {
                    connections.spawn(converse(stream, router.clone(), stopping.subscribe()));
                }
                Err(error) => {
                    tracing::warn!(%error, "a REST client could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    stopping.send_replace(true);
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// Says why, as far as that goes without waiting, and hangs up.
fn refuse(stream: &UnixStream) {
    tracing::warn!(
        limit = CONNECTIONS_MAX,
        "a REST client is hung up on: as many as allowed are connected"
    );
    let _ = stream.try_write(TOO_MANY);
}

async fn converse(stream: UnixStream, router: Router, mut stopping: watch::Receiver<bool>) {
    let service = TowerToHyperService::new(router);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_WAIT)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    // A connection that breaks is its client's loss; what it asked for has been done or refused.
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = stopping.wait_for(|is_stopping| *is_stopping) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = connection.await;
}
