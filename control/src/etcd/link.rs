//! The way to etcd: one member at a time, the next when it fails, within a limit of time.
//!
//! The client's own balancing would send every third request to a dead member. Here a failure is a change of member,
//! and whether a change may be asked for again is decided in one place: only when it certainly was not made.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use tokio::sync::Mutex;

use super::EtcdSettings;
use crate::backend::BackendError;

/// What one member gets for one answer. Elections take about a second.
const TRY_FOR: Duration = Duration::from_secs(2);
const CONNECT_FOR: Duration = Duration::from_secs(1);
/// Between tries, so that an etcd that refuses at once is not asked a thousand times a second.
const PAUSE: Duration = Duration::from_millis(100);
/// etcd hangs up on who pings more often than every 5 seconds.
const PING_EVERY: Duration = Duration::from_secs(6);
const PING_WITHIN: Duration = Duration::from_secs(3);

/// See the module.
pub(super) struct Link {
    pub settings: EtcdSettings,
    /// Index of the member in use; grows with every failure.
    at: AtomicUsize,
    client: Mutex<Option<(usize, Client)>>,
}

impl Link {
    pub fn new(settings: EtcdSettings) -> Link {
        Link {
            settings,
            at: AtomicUsize::new(0),
            client: Mutex::new(None),
        }
    }

    /// Asks until there is an answer; for what may be asked twice.
    pub async fn read<T, F, A>(&self, operation: &'static str, ask: F) -> Result<T, BackendError>
    where
        F: Fn(Client) -> A,
        A: Future<Output = Result<T, Error>>,
    {
        self.ask(operation, ask, true).await
    }

    /// Asks until there is an answer, or the request may have arrived.
    pub async fn change<T, F, A>(&self, operation: &'static str, ask: F) -> Result<T, BackendError>
    where
        F: Fn(Client) -> A,
        A: Future<Output = Result<T, Error>>,
    {
        self.ask(operation, ask, false).await
    }

    async fn ask<T, F, A>(&self, operation: &'static str, ask: F, may_repeat: bool) -> Result<T, BackendError>
    where
        F: Fn(Client) -> A,
        A: Future<Output = Result<T, Error>>,
    {
        let began = Instant::now();
        let mut tries = 0;
        loop {
            tries += 1;
            let sent = Instant::now();
            let (at, failure) = match self.client().await {
                Err((at, error)) => (at, Failure::of(&error, false)),
                Ok((at, client)) => match tokio::time::timeout(TRY_FOR, ask(client)).await {
                    Ok(Ok(answer)) => return Ok(answer),
                    Ok(Err(error)) => (at, Failure::of(&error, true)),
                    Err(_) => {
                        let reason = format!("no answer within {} ms", TRY_FOR.as_millis());
                        (at, Failure::Lost(reason))
                    }
                },
            };
            let reason = match failure {
                Failure::Refused { code, reason } => {
                    return Err(BackendError::Refused {
                        operation,
                        code,
                        reason,
                    });
                }
                Failure::Lost(reason) if !may_repeat => {
                    self.leave(at).await;
                    return Err(BackendError::Unknown {
                        operation,
                        waited: sent.elapsed(),
                        reason,
                    });
                }
                Failure::Lost(reason) | Failure::NotMade(reason) => reason,
            };
            self.leave(at).await;
            if began.elapsed() + PAUSE >= self.settings.patience {
                return Err(BackendError::Unreachable {
                    operation,
                    tries,
                    endpoints: self.settings.endpoints.len(),
                    waited: began.elapsed(),
                    reason: format!("{reason} (the last at {})", self.endpoint(at)),
                });
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn endpoint(&self, at: usize) -> &str {
        &self.settings.endpoints[at % self.settings.endpoints.len()]
    }

    /// A client of the member in use.
    pub async fn client(&self) -> Result<(usize, Client), (usize, Error)> {
        let mut held = self.client.lock().await;
        if let Some((at, client)) = &*held {
            return Ok((*at, client.clone()));
        }
        let at = self.at.load(Ordering::Relaxed);
        let endpoint = self.endpoint(at).to_owned();
        let connect = Client::connect([endpoint], Some(self.options()));
        let client = match tokio::time::timeout(TRY_FOR, connect).await {
            Ok(client) => client.map_err(|error| (at, error))?,
            Err(_) => return Err((at, Error::Internal("no connection in time".to_owned()))),
        };
        *held = Some((at, client.clone()));
        Ok((at, client))
    }

    /// The member at `at` failed; the next one is used from now on, unless that has happened already.
    pub async fn leave(&self, at: usize) {
        let mut held = self.client.lock().await;
        if self.at.load(Ordering::Relaxed) == at {
            self.at.store(at + 1, Ordering::Relaxed);
            *held = None;
        }
    }

    fn options(&self) -> ConnectOptions {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_FOR)
            .with_keep_alive(PING_EVERY, PING_WITHIN)
            .with_require_leader(true);
        if let Some((name, password)) = &self.settings.user {
            options = options
                .with_user(name.clone(), password.clone())
                .with_auto_token_refresh(true);
        }
        if let Some(tls) = &self.settings.tls {
            let mut given = TlsOptions::new();
            if let Some(authority) = &tls.authority {
                given = given.ca_certificate(Certificate::from_pem(authority));
            }
            if let Some((certificate, key)) = &tls.identity {
                given = given.identity(Identity::from_pem(certificate, key));
            }
            if let Some(name) = &tls.server_name {
                given = given.domain_name(name.clone());
            }
            options = options.with_tls(given);
        }
        options
    }
}

/// What a failed try means.
enum Failure {
    /// etcd, or the client by itself, says no; asking again would not help. Nothing was changed.
    Refused { code: i32, reason: String },
    /// Nothing was changed; another member may answer.
    NotMade(String),
    /// Nobody knows.
    Lost(String),
}

impl Failure {
    fn of(error: &Error, was_sent: bool) -> Failure {
        /// Codes of gRPC that say: it was understood and will not be done.
        const FINAL: [i32; 8] = [3, 5, 6, 7, 8, 9, 11, 16];
        let reason = chain(error);
        match error {
            Error::GRpcStatus(status) if FINAL.contains(&(status.code() as i32)) => Failure::Refused {
                code: status.code() as i32,
                reason,
            },
            Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::InvalidMetadataValue(_) => {
                Failure::Refused { code: 3, reason }
            }
            _ if !was_sent || was_never_sent(&reason) => Failure::NotMade(reason),
            _ => Failure::Lost(reason),
        }
    }
}

/// No connection was made; or the member said so before it proposed anything.
fn was_never_sent(reason: &str) -> bool {
    [
        "tcp connect error",
        "etcdserver: no leader",
        "invalid peer certificate",
    ]
    .iter()
    .any(|words| reason.contains(words))
}

/// The error with all its causes, each once: gRPC's own words are often only "transport error".
fn chain(error: &Error) -> String {
    let mut text = match error {
        Error::GRpcStatus(status) => status.message().to_owned(),
        other => other.to_string(),
    };
    let mut cause: Option<&dyn std::error::Error> = match error {
        Error::GRpcStatus(status) => std::error::Error::source(status),
        Error::TransportError(error) => std::error::Error::source(error),
        _ => None,
    };
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = error.source();
    }
    text.chars().filter(|c| !c.is_control()).take(400).collect()
}
