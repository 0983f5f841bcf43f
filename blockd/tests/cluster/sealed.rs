//! Daemons that speak TLS with each other, and one that does not.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use serde_json::json;

use super::etcd::{Servers, until};
use super::support::{Daemon, GIB, fill, verify, weft};
use super::{find, host, host_with, in_sync, until_disks};

/// Signs the certificates of hosts, into files of a folder of its own.
struct Authority {
    folder: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let folder = tempfile::tempdir().expect("temporary folder");
        let mut parameters = CertificateParams::new(Vec::new()).expect("parameters");
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let certificate = parameters.self_signed(&key).expect("a certificate");
        write(&folder.path().join("ca.pem"), &certificate.pem());
        let issuer = Issuer::new(parameters, key);
        Authority { folder, issuer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A new certificate of a host, in the place of the last one.
    fn certify(&self, host: &str, until_year: i32) {
        let key = KeyPair::generate().expect("a key");
        let mut parameters = CertificateParams::new(vec![host.to_owned()]).expect("parameters");
        parameters.not_after = date_time_ymd(until_year, 1, 1);
        let certificate = parameters.signed_by(&key, &self.issuer).expect("a certificate");
        write(&self.path(&format!("{host}.pem")), &certificate.pem());
        write(&self.path(&format!("{host}.key")), &key.serialize_pem());
    }

    fn start(&self, servers: &Servers, host: &str) -> Daemon {
        self.certify(host, 2100);
        let settings = format!(
            "tls_ca = '{}'\ntls_certificate = '{}'\ntls_key = '{}'\n",
            self.path("ca.pem").display(),
            self.path(&format!("{host}.pem")).display(),
            self.path(&format!("{host}.key")).display(),
        );
        host_with(&servers.endpoints(), host, "", &settings)
    }
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).expect("write");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).expect("chmod");
}

/// Why `daemon` does not reach `host`, once it does not.
fn until_unreached(daemon: &Daemon, host: &str, reason: &str) {
    until(&format!("{host} is not reached: {reason}"), || {
        let hosts = daemon.get("/v1/hosts");
        let unreached = &find(&hosts, host)["unreached"];
        unreached.as_str()?.contains(reason).then_some(())
    });
}

/// Sends SIGHUP and waits until the daemon's log says that the settings were read so often.
fn reread(daemon: &Daemon, times: usize) {
    let sent = Command::new("kill")
        .args(["-HUP", &daemon.pid().to_string()])
        .status();
    assert!(sent.expect("kill").success());
    until("the settings are read again", || {
        (daemon.log().matches("settings reread").count() == times).then_some(())
    });
}

/// A VDI in three copies over links that are sealed; a host without certificates has no part in it and is told why; a
/// certificate that is renewed takes effect without a restart.
#[test]
fn a_vdi_is_replicated_by_hosts_with_certificates() {
    let servers = Servers::start(1);
    let authority = Authority::new();
    let names = ["alpha", "beta", "gamma"];
    let mut hosts = names.map(|name| authority.start(&servers, name));
    hosts[0].post("/v1/pool", &json!({"name": "test"}));
    for host in &hosts {
        host.add_disk(1);
    }
    until_disks(&hosts[0], 3);
    hosts[0].create_vdi("web", GIB, 3);
    hosts[0].attach_nbd("web");
    fill(&hosts[0], "web", 0, 64, 0x11);
    until("three copies are there", || {
        (in_sync(&hosts[0], "web") == 3).then_some(())
    });

    let open = host(&servers, "open");
    until_unreached(
        &open,
        "alpha",
        "host 'alpha' asks host 'open' for TLS: it does not speak TLS",
    );
    until_unreached(&hosts[0], "open", "is TLS set there?");
    let socket = hosts[0].path("state/blockd.sock").display().to_string();
    let shown = weft(&["--socket", &socket, "host", "list"]);
    assert!(shown.out.contains("NOT REACHED"), "{}", shown.out);
    assert!(
        shown.out.contains("open is not reached from here: TLS: "),
        "{}",
        shown.out
    );

    // beta's certificate expires; nobody notices until a link is made.
    authority.certify("beta", 2021);
    reread(&hosts[1], 1);
    fill(&hosts[0], "web", 64, 64, 0x22);
    assert_eq!(in_sync(&hosts[0], "web"), 3);
    hosts[2].kill();
    hosts[2].start_again();
    until_unreached(&hosts[2], "beta", "certificate expired");
    // A certificate of somebody else is not taken over.
    for file in ["pem", "key"] {
        let theirs = authority.path(&format!("alpha.{file}"));
        std::fs::copy(theirs, authority.path(&format!("beta.{file}"))).expect("copy");
    }
    let sent = Command::new("kill")
        .args(["-HUP", &hosts[1].pid().to_string()])
        .status();
    assert!(sent.expect("kill").success());
    until("whose it is", || {
        hosts[1]
            .log()
            .contains("not valid for name \"beta\"")
            .then_some(())
    });
    authority.certify("beta", 2100);
    reread(&hosts[1], 2);
    until("gamma reaches beta again", || {
        let hosts = hosts[2].get("/v1/hosts");
        find(&hosts, "beta")["unreached"].is_null().then_some(())
    });
    until("three copies are there again", || {
        (in_sync(&hosts[0], "web") == 3).then_some(())
    });
    verify(&hosts[0], "web", 0, 64, 0x11);
    verify(&hosts[0], "web", 64, 64, 0x22);
}
