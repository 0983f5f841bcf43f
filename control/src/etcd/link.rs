//! The way to etcd: one member at a time, the next when it fails, within a limit of time.
//!
//! The client's own balancing would send every third request to a dead member. Here a failure is a change of member,
//! and whether a change may be asked for again is decided in one place: only when it certainly was not made.

use std::future::Future;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use etcd_client::{
    Certificate, Client, ConnectOptions, Error, GetResponse, Identity, ResponseHeader, TlsOptions,
    TxnResponse,
};

use super::EtcdSettings;
use super::known::Known;
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
    pub known: Known,
    member: Mutex<Member>,
    /// Held by the one who connects; the others wait for what comes of it.
    connecting: tokio::sync::Mutex<()>,
}

/// The member in use.
#[derive(Default)]
struct Member {
    /// Its index; grows with every failure.
    at: usize,
    client: Option<Client>,
}

/// An answer that etcd as a whole gives, not a member for itself: its revision is at least every one that was known
/// when it was asked for.
pub(super) trait Dated {
    fn header(&self) -> Option<&ResponseHeader>;

    fn revision(&self) -> i64 {
        self.header().map_or(0, ResponseHeader::revision)
    }
}

impl Dated for GetResponse {
    fn header(&self) -> Option<&ResponseHeader> {
        self.header()
    }
}

impl Dated for TxnResponse {
    fn header(&self) -> Option<&ResponseHeader> {
        self.header()
    }
}

impl Link {
    pub fn new(settings: EtcdSettings, known: Known) -> Link {
        Link {
            settings,
            known,
            member: Mutex::default(),
            connecting: tokio::sync::Mutex::default(),
        }
    }

    /// Asks until there is an answer, from an etcd that is believed before and after; for what may be asked twice.
    pub async fn read_believed<T, F, A>(&self, operation: &'static str, ask: F) -> Result<T, BackendError>
    where
        T: Dated,
        F: Fn(Client) -> A,
        A: Future<Output = Result<T, Error>>,
    {
        self.ask_believed(operation, ask, true).await
    }

    /// Asks an etcd that is believed, before and after, until there is an answer or the request may have arrived.
    pub async fn change_believed<T, F, A>(&self, operation: &'static str, ask: F) -> Result<T, BackendError>
    where
        T: Dated,
        F: Fn(Client) -> A,
        A: Future<Output = Result<T, Error>>,
    {
        self.ask_believed(operation, ask, false).await
    }

    async fn ask_believed<T, F, A>(
        &self,
        operation: &'static str,
        ask: F,
        may_repeat: bool,
    ) -> Result<T, BackendError>
    where
        T: Dated,
        F: Fn(Client) -> A,
        A: Future<Output = Result<T, Error>>,
    {
        self.known.believed()?;
        // What is known grows while the answer is on its way: it is held against what was known before it was asked for.
        let with_floor = |client| {
            let floor = self.known.revision();
            let asked = ask(client);
            async move { Ok((floor, asked.await?)) }
        };
        let (floor, answer) = self.ask(operation, with_floor, may_repeat).await?;
        self.known.heard(floor, answer.revision())?;
        Ok(answer)
    }

    /// Asks until there is an answer, while etcd is believed; for what may be asked twice.
    pub async fn read<T, F, A>(&self, operation: &'static str, ask: F) -> Result<T, BackendError>
    where
        F: Fn(Client) -> A,
        A: Future<Output = Result<T, Error>>,
    {
        self.known.believed()?;
        self.ask(operation, ask, true).await
    }

    /// Asks until there is an answer; unless `may_repeat` only as long as the request certainly did not arrive.
    pub async fn ask<T, F, A>(
        &self,
        operation: &'static str,
        ask: F,
        may_repeat: bool,
    ) -> Result<T, BackendError>
    where
        F: Fn(Client) -> A,
        A: Future<Output = Result<T, Error>>,
    {
        let began = Instant::now();
        let mut tries = 0;
        loop {
            tries += 1;
            let sent = Instant::now();
            let left = self.settings.patience.saturating_sub(began.elapsed());
            let (at, failure) = match self.client(left).await {
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
                    self.leave(at);
                    return Err(BackendError::Unknown {
                        operation,
                        waited: sent.elapsed(),
                        reason,
                    });
                }
                Failure::Lost(reason) | Failure::NotMade(reason) => reason,
            };
            self.leave(at);
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

    fn member(&self) -> MutexGuard<'_, Member> {
        self.member.lock().expect("no panic while the member was held")
    }

    /// The member in use, and a client of it if there is one.
    fn present(&self) -> Result<(usize, Client), usize> {
        let member = self.member();
        let client = member.client.clone();
        client.map(|client| (member.at, client)).ok_or(member.at)
    }

    /// A client of the member in use, within `time` or little more. One connects, the others wait for it; the member
    /// that does not let itself be connected to is left before the next of them has his turn, so that they do not try
    /// it one after the other.
    pub async fn client(&self, time: Duration) -> Result<(usize, Client), (usize, Error)> {
        let began = Instant::now();
        if let Ok(present) = self.present() {
            return Ok(present);
        }
        let turn = tokio::time::timeout(time, self.connecting.lock()).await;
        let at = match self.present() {
            Ok(present) => return Ok(present),
            Err(at) => at,
        };
        let Ok(_turn) = turn else {
            let reason = format!("no connection within {} ms", began.elapsed().as_millis());
            return Err((at, Error::Internal(reason)));
        };
        let connect = Client::connect([self.endpoint(at).to_owned()], Some(self.options()));
        let failure = match tokio::time::timeout(TRY_FOR, connect).await {
            Ok(Ok(client)) => {
                self.member().client = Some(client.clone());
                return Ok((at, client));
            }
            Ok(Err(error)) => error,
            Err(_) => Error::Internal("no connection in time".to_owned()),
        };
        self.leave(at);
        Err((at, failure))
    }

    /// The member at `at` failed; the next one is used from now on, unless that has happened already.
    pub fn leave(&self, at: usize) {
        let mut member = self.member();
        if member.at == at {
            *member = Member {
                at: at + 1,
                client: None,
            };
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
