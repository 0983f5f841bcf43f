//! `blockd`: the Weft storage daemon.

mod cluster_config;
mod config;
mod daemon;
mod index;
mod links;
mod nbd_export;
mod plane;
mod start;

use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

use config::{Flags, LogFormat, Settings};
use daemon::{Daemon, RestService};

/// Counts what each thread asks for; a data-plane thread asks for nothing per request.
#[global_allocator]
static ALLOCATOR: edge::allocations::Counting = edge::allocations::Counting;

fn main() {
    let flags = Flags::parse();
    if let Err(error) = run(&flags) {
        eprintln!("blockd: {error:#}");
        std::process::exit(1);
    }
}

fn run(flags: &Flags) -> Result<()> {
    let settings = Settings::load(flags)?;
    let log = start_log(&settings)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("control")
        .enable_all()
        .build()
        .context("cannot start the control threads")?;
    runtime.block_on(serve(flags, settings, &log))
}

async fn serve(flags: &Flags, settings: Settings, log: &reload::Handle<EnvFilter, Registry>) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let daemon = Daemon::start(settings).await?;
    let service = Arc::new(RestService(Arc::clone(&daemon)));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let socket = daemon.socket();
    let listener = control::rest::bind(&socket)
        .await
        .with_context(|| format!("REST socket {}", socket.display()))?;
    let rest = tokio::spawn(control::rest::serve(
        listener,
        control::rest::router(service),
        async move {
            let _ = stopped.await;
        },
    ));
    tracing::info!(socket = %daemon.socket().display(), "ready");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => reread(flags, log, &daemon),
        }
    }
    tracing::info!("stopping");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    let _ = stop.send(());
    rest.await?.context("REST")?;
    daemon.drain().await;
    Ok(())
}

/// SIGHUP: the log filter takes effect at once, certificates with the next link; what needs a restart is left and said.
fn reread(flags: &Flags, log: &reload::Handle<EnvFilter, Registry>, daemon: &Daemon) {
    let result = Settings::load(flags).and_then(|settings| {
        let filter = EnvFilter::try_new(&settings.log).context("setting 'log'")?;
        log.reload(filter).context("log filter")?;
        daemon.renew_certificates(settings.cluster.as_ref())
    });
    match result {
        Ok(()) => tracing::info!(
            "settings reread: `log` is in effect, certificates with the next links, the others at the next start"
        ),
        Err(error) => tracing::error!("settings not reread: {error:#}"),
    }
}

fn start_log(settings: &Settings) -> Result<reload::Handle<EnvFilter, Registry>> {
    let filter = EnvFilter::try_new(&settings.log).context("setting 'log'")?;
    let (filter, handle) = reload::Layer::new(filter);
    let registry = tracing_subscriber::registry().with(filter);
    let is_terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(is_terminal);
    match settings.log_format {
        LogFormat::Text => registry.with(lines.with_target(false)).init(),
        LogFormat::Json => registry.with(lines.json()).init(),
    }
    Ok(handle)
}
