//! `[cluster]` of the settings: which host this is, and where etcd is. Without it the host is a pool of its own.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use control::Name;
use control::etcd::{EtcdSettings, EtcdTls};
use serde::Deserialize;

/// How long one change of a record may take while etcd does not answer.
const PATIENCE: Duration = Duration::from_secs(5);
const MEMBERS_MAX: usize = 16;
const PREFIX_BYTES_MAX: usize = 128;
/// Longest file of a certificate, a key or a password.
const SECRET_BYTES_MAX: u64 = 1 << 20;

/// As in the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterFile {
    host: String,
    listen: String,
    advertise: Option<String>,
    zone: Option<String>,
    etcd: Vec<String>,
    etcd_prefix: Option<String>,
    etcd_user: Option<String>,
    etcd_password_file: Option<PathBuf>,
    etcd_ca: Option<PathBuf>,
    etcd_certificate: Option<PathBuf>,
    etcd_key: Option<PathBuf>,
    tls_ca: Option<PathBuf>,
    tls_certificate: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    lease_s: Option<u64>,
}

/// Checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterSettings {
    /// This host's name, unlike all others'.
    pub host: Name,
    /// Where other hosts connect.
    pub listen: SocketAddr,
    /// What they are told.
    pub advertise: SocketAddr,
    /// Failure domain above the host; empty: none.
    pub zone: String,
    /// Where etcd is.
    pub etcd: EtcdSettings,
    /// Of links between hosts; none: they are not encrypted, and any program that reaches `listen` may speak as a host.
    pub tls: Option<TlsFiles>,
    /// How long this host counts as alive when it is not heard.
    pub lease: Duration,
}

/// PEM, as in the files that the settings name.
#[derive(Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The authorities whose signature is believed.
    pub authority: Vec<u8>,
    /// This host's certificate, and those between it and an authority.
    pub certificate: Vec<u8>,
    /// Its key.
    pub key: Vec<u8>,
}

impl std::fmt::Debug for TlsFiles {
    /// Without what is secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsFiles")
    }
}

impl ClusterFile {
    /// Checks each setting, and that they do not contradict each other.
    pub fn check(self) -> Result<ClusterSettings> {
        let host: Name = self
            .host
            .parse()
            .map_err(|error| anyhow::anyhow!("setting 'cluster.host': {error}"))?;
        let zone = match &self.zone {
            None => String::new(),
            Some(zone) => zone
                .parse::<Name>()
                .map_err(|error| anyhow::anyhow!("setting 'cluster.zone': {error}"))?
                .to_string(),
        };
        let listen = address("listen", &self.listen)?;
        let advertise = match &self.advertise {
            Some(text) => address("advertise", text)?,
            None => listen,
        };
        if advertise.ip().is_unspecified() {
            bail!(
                "setting 'cluster.advertise' is {advertise}: name the address at which the other hosts reach this one"
            );
        }
        let lease_s = self.lease_s.unwrap_or(10);
        if !(3..=600).contains(&lease_s) {
            bail!("setting 'cluster.lease_s' is {lease_s}: 3 to 600");
        }
        let etcd = self.etcd(&[listen, advertise])?;
        let tls = self.link_tls()?;
        Ok(ClusterSettings {
            host,
            listen,
            advertise,
            zone,
            etcd,
            tls,
            lease: Duration::from_secs(lease_s),
        })
    }

    fn etcd(&self, ours: &[SocketAddr]) -> Result<EtcdSettings> {
        if self.etcd.is_empty() || self.etcd.len() > MEMBERS_MAX {
            bail!(
                "setting 'cluster.etcd' has {} addresses: 1 to {MEMBERS_MAX}",
                self.etcd.len()
            );
        }
        let is_tls = self.etcd[0].starts_with("https://");
        for (i, url) in self.etcd.iter().enumerate() {
            let shown: String = url.chars().take(120).filter(|c| !c.is_control()).collect();
            let place = url.strip_prefix(if is_tls { "https://" } else { "http://" });
            let Some(place) = place else {
                bail!(
                    "setting 'cluster.etcd' has '{shown}': write http://ADDRESS:PORT, or https:// for all of them"
                );
            };
            let is_place = place.rsplit_once(':').is_some_and(|(name, port)| {
                let is_name = |c: char| c.is_ascii_alphanumeric() || ".-_[]:".contains(c);
                !name.is_empty()
                    && name.chars().all(is_name)
                    && port.parse::<u16>().is_ok_and(|port| port != 0)
            });
            if !is_place {
                bail!("setting 'cluster.etcd' has '{shown}': write http://ADDRESS:PORT");
            }
            if self.etcd[..i].contains(url) {
                bail!("setting 'cluster.etcd' names '{shown}' twice");
            }
            if ours.iter().any(|ours| place.parse() == Ok(*ours)) {
                bail!("setting 'cluster.etcd' has '{shown}', which is where this host itself listens");
            }
        }
        let prefix = self.etcd_prefix.clone().unwrap_or_else(|| "/weft/".to_owned());
        let is_prefix = prefix.starts_with('/')
            && prefix.ends_with('/')
            && prefix.len() > 1
            && prefix.len() <= PREFIX_BYTES_MAX
            && prefix
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"/-_.".contains(&b));
        if !is_prefix {
            bail!(
                "setting 'cluster.etcd_prefix' has to begin and end with '/', of letters, digits, '-', '_' and '.', at most {PREFIX_BYTES_MAX} bytes"
            );
        }
        let user = match (&self.etcd_user, &self.etcd_password_file) {
            (None, None) => None,
            (Some(user), Some(path)) => {
                let password = secret("etcd_password_file", path)?;
                let password = String::from_utf8(password)
                    .with_context(|| format!("setting 'cluster.etcd_password_file': {}", path.display()))?;
                Some((user.clone(), password.trim_end_matches(['\r', '\n']).to_owned()))
            }
            (Some(_), None) => bail!("setting 'cluster.etcd_user' needs 'cluster.etcd_password_file'"),
            (None, Some(_)) => bail!("setting 'cluster.etcd_password_file' needs 'cluster.etcd_user'"),
        };
        Ok(EtcdSettings {
            endpoints: self.etcd.clone(),
            prefix,
            user,
            tls: self.tls(is_tls)?,
            patience: PATIENCE,
        })
    }

    fn tls(&self, is_tls: bool) -> Result<Option<EtcdTls>> {
        if !is_tls {
            for (name, file) in [
                ("etcd_ca", &self.etcd_ca),
                ("etcd_certificate", &self.etcd_certificate),
                ("etcd_key", &self.etcd_key),
            ] {
                if file.is_some() {
                    bail!("setting 'cluster.{name}' is for https, but 'cluster.etcd' has http addresses");
                }
            }
            return Ok(None);
        }
        let Some(authority) = &self.etcd_ca else {
            bail!("setting 'cluster.etcd' has https addresses and needs 'cluster.etcd_ca'");
        };
        let identity = match (&self.etcd_certificate, &self.etcd_key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => {
                Some((secret("etcd_certificate", certificate)?, secret("etcd_key", key)?))
            }
            (Some(_), None) => bail!("setting 'cluster.etcd_certificate' needs 'cluster.etcd_key'"),
            (None, Some(_)) => bail!("setting 'cluster.etcd_key' needs 'cluster.etcd_certificate'"),
        };
        Ok(Some(EtcdTls {
            authority: Some(secret("etcd_ca", authority)?),
            identity,
            server_name: None,
        }))
    }
}

impl ClusterFile {
    fn link_tls(&self) -> Result<Option<TlsFiles>> {
        let files = [
            ("tls_ca", &self.tls_ca),
            ("tls_certificate", &self.tls_certificate),
            ("tls_key", &self.tls_key),
        ];
        if files.iter().all(|(_, file)| file.is_none()) {
            return Ok(None);
        }
        let read = |(name, file): (&str, &Option<PathBuf>)| match file {
            Some(path) => secret(name, path),
            None => bail!("setting 'cluster.{name}' is missing: TLS needs all three of its files"),
        };
        let [authority, certificate, key] = files;
        if let Some(path) = key.1 {
            is_ours_alone(key.0, path)?;
        }
        Ok(Some(TlsFiles {
            authority: read(authority)?,
            certificate: read(certificate)?,
            key: read(key)?,
        }))
    }
}

/// Who can read this host's key can speak as this host.
fn is_ours_alone(name: &str, path: &Path) -> Result<()> {
    let shown = shown(path);
    let metadata = std::fs::metadata(path).with_context(|| format!("setting 'cluster.{name}': {shown}"))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        bail!("setting 'cluster.{name}': {shown} has mode {mode:03o}, open to others: chmod 600");
    }
    Ok(())
}

fn address(name: &str, text: &str) -> Result<SocketAddr> {
    let shown: String = text.chars().take(80).filter(|c| !c.is_control()).collect();
    let address: SocketAddr = match text.parse() {
        Ok(address) => address,
        Err(_) => {
            bail!("setting 'cluster.{name}' is '{shown}': write ADDRESS:PORT, for example 10.0.0.1:7700")
        }
    };
    if address.port() == 0 {
        bail!("setting 'cluster.{name}' is '{shown}': a port of its own, not 0");
    }
    Ok(address)
}

fn shown(path: &Path) -> String {
    let text = path.to_string_lossy();
    text.chars().filter(|c| !c.is_control()).collect()
}

/// A small regular file.
fn secret(name: &str, path: &Path) -> Result<Vec<u8>> {
    let shown = shown(path);
    let metadata = std::fs::metadata(path).with_context(|| format!("setting 'cluster.{name}': {shown}"))?;
    if !metadata.is_file() || metadata.len() > SECRET_BYTES_MAX || metadata.len() == 0 {
        bail!("setting 'cluster.{name}': {shown} is not a file of 1 to {SECRET_BYTES_MAX} bytes");
    }
    std::fs::read(path).with_context(|| format!("setting 'cluster.{name}': {shown}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<ClusterSettings> {
        toml::from_str::<ClusterFile>(text)?.check()
    }

    const LEAST: &str = "host = 'h1'\nlisten = '10.0.0.1:7700'\netcd = ['http://10.0.0.1:2379']\n";

    #[test]
    fn the_least_that_is_needed_is_enough() {
        let settings = check(LEAST).expect("valid");
        assert_eq!(settings.host.as_str(), "h1");
        assert_eq!(settings.advertise, settings.listen);
        assert_eq!(
            (settings.lease, settings.zone.as_str()),
            (Duration::from_secs(10), "")
        );
        assert_eq!(settings.etcd.prefix, "/weft/");
    }

    /// Authority, certificate, key, and the key once more as others can read it. What is in them is not looked at here.
    fn tls_files(folder: &Path) -> [String; 4] {
        let write = |name: &str, bytes: &[u8], mode| {
            let path = folder.join(name);
            std::fs::write(&path, bytes).expect("write");
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(&path, mode).expect("chmod");
            path.display().to_string()
        };
        [
            write("ca.pem", b"authority", 0o644),
            write("h1.pem", b"certificate", 0o644),
            write("h1.key", b"PRIVATE", 0o600),
            write("open.key", b"PRIVATE", 0o640),
        ]
    }

    #[test]
    fn what_is_unknown_wrong_or_contradictory_is_named() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let secret = folder.path().join("secret");
        std::fs::write(&secret, "password\n").expect("write");
        let mode = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&secret, mode).expect("chmod");
        let secret = secret.display();
        let [ca, certificate, key, open] = tls_files(folder.path());
        let tls = format!("tls_ca = '{ca}'\ntls_certificate = '{certificate}'");
        // Lines that replace those of the same name, and what the refusal says.
        for (lines, words) in [
            ("host = 'H 1'", "cluster.host"),
            ("host = ''", "cluster.host"),
            ("listen = 'here'", "cluster.listen"),
            ("listen = '10.0.0.1:0'", "cluster.listen"),
            ("listen = '0.0.0.0:7700'", "cluster.advertise"),
            ("advertise = '[::]:1'", "cluster.advertise"),
            ("zone = 'Rack 1'", "cluster.zone"),
            ("lease_s = 2", "cluster.lease_s"),
            ("lease_s = 601", "cluster.lease_s"),
            ("etcd = []", "cluster.etcd"),
            ("etcd = ['10.0.0.1:2379']", "http://ADDRESS:PORT"),
            ("etcd = ['http://10.0.0.1']", "http://ADDRESS:PORT"),
            ("etcd = ['http://10.0.0.1:0']", "http://ADDRESS:PORT"),
            ("etcd = ['http://a b:1']", "http://ADDRESS:PORT"),
            ("etcd = ['http://a:1', 'http://a:1']", "twice"),
            ("etcd = ['http://a:1', 'https://b:1']", "https:// for all"),
            ("etcd = ['http://10.0.0.1:7700']", "itself listens"),
            ("etcd = ['https://a:1']", "cluster.etcd_ca"),
            ("etcd_prefix = 'weft'", "cluster.etcd_prefix"),
            ("etcd_prefix = '/'", "cluster.etcd_prefix"),
            ("etcd_user = 'weft'", "cluster.etcd_password_file"),
            (&format!("etcd_password_file = '{secret}'"), "cluster.etcd_user"),
            (&format!("etcd_ca = '{secret}'"), "cluster.etcd_ca"),
            (&format!("etcd_key = '{secret}'"), "cluster.etcd_key"),
            (
                &format!("etcd = ['https://a:1']\netcd_ca = '{secret}'\netcd_key = '{secret}'"),
                "cluster.etcd_certificate",
            ),
            ("etcd = ['https://a:1']\netcd_ca = '/nowhere'", "/nowhere"),
            ("etcd = ['https://a:1']\netcd_ca = '/dev/null'", "not a file"),
            (&format!("tls_ca = '{ca}'"), "cluster.tls_certificate"),
            (
                &format!("tls_ca = '{ca}'\ntls_certificate = '{certificate}'"),
                "cluster.tls_key",
            ),
            (
                &format!("tls_certificate = '{certificate}'\ntls_key = '{key}'"),
                "cluster.tls_ca",
            ),
            (
                &format!("{tls}\ntls_key = '{open}'"),
                "mode 640, open to others: chmod 600",
            ),
            (&format!("{tls}\ntls_key = '/nowhere'"), "/nowhere"),
            ("hots = 'h1'", "hots"),
            ("host = 1", "host"),
        ] {
            let name = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
            let replaced: Vec<String> = lines.lines().map(name).collect();
            let kept = LEAST.lines().filter(|line| !replaced.contains(&name(line)));
            let text: Vec<&str> = kept.chain(lines.lines()).collect();
            let error = format!("{:#}", check(&text.join("\n")).expect_err(lines));
            assert!(error.contains(words), "{lines}: {error}");
        }
        for missing in LEAST.lines() {
            assert!(check(&LEAST.replace(missing, "")).is_err(), "{missing}");
        }
        let sealed = check(&format!("{LEAST}{tls}\ntls_key = '{key}'")).expect("valid");
        assert!(sealed.tls.is_some() && check(LEAST).expect("valid").tls.is_none());
        let shown = format!("{sealed:?}");
        assert!(shown.contains("tls: Some(TlsFiles)"), "never in a log: {shown}");
        let twice = format!("{LEAST}host = 'h2'\n");
        assert!(check(&twice).is_err(), "a host that names itself twice");
        let user = format!("{LEAST}etcd_user = 'weft'\netcd_password_file = '{secret}'");
        let settings = check(&user).expect("valid");
        assert_eq!(
            settings.etcd.user,
            Some(("weft".to_owned(), "password".to_owned()))
        );
        assert!(!format!("{settings:?}").contains("password"), "never in a log");
    }
}
