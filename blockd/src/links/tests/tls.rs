//! Links with certificates: who may speak, and that nobody else can listen.

use std::sync::Mutex as StdMutex;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};

use super::*;
use crate::cluster_config::TlsFiles;
use crate::links::tls::{HANDSHAKE, Tls};

/// Signs certificates.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Authority {
        let mut parameters = CertificateParams::new(Vec::new()).expect("parameters");
        parameters.distinguished_name.push(DnType::CommonName, name);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let pem = parameters.self_signed(&key).expect("a certificate").pem();
        let issuer = Issuer::new(parameters, key);
        Authority { pem, issuer }
    }

    fn files_until(&self, name: &str, year: i32) -> TlsFiles {
        let mut parameters = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        parameters.not_before = date_time_ymd(2020, 1, 1);
        parameters.not_after = date_time_ymd(year, 1, 1);
        parameters.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate().expect("a key");
        let certificate = parameters.signed_by(&key, &self.issuer).expect("a certificate");
        TlsFiles {
            authority: self.pem.clone().into_bytes(),
            certificate: certificate.pem().into_bytes(),
            key: key.serialize_pem().into_bytes(),
        }
    }

    /// What a host of that name needs.
    fn files(&self, name: &str) -> TlsFiles {
        self.files_until(name, 2100)
    }

    fn tls(&self, name: &str) -> Arc<Tls> {
        ready(&self.files(name), name)
    }
}

fn ready(files: &TlsFiles, name: &str) -> Arc<Tls> {
    Arc::new(Tls::new(files, name).expect("good files, but for the time perhaps"))
}

async fn sealed(number: u128, planes: usize, tls: Option<Arc<Tls>>) -> Host {
    Host::start_sealed(number, planes, SILENCE, tls).await
}

/// Passes bytes on to `target` and keeps what the caller said.
fn listening_proxy(target: SocketAddr) -> (SocketAddr, Arc<StdMutex<Vec<u8>>>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    let heard = Arc::new(StdMutex::new(Vec::new()));
    let ears = Arc::clone(&heard);
    std::thread::spawn(move || {
        while let Ok((mut near, _)) = listener.accept() {
            let mut far = std::net::TcpStream::connect(target).expect("the target");
            let (mut back, mut forth) = (
                far.try_clone().expect("a copy"),
                near.try_clone().expect("a copy"),
            );
            std::thread::spawn(move || std::io::copy(&mut back, &mut forth));
            let ears = Arc::clone(&ears);
            std::thread::spawn(move || {
                let mut bytes = vec![0; 64 << 10];
                while let Ok(count @ 1..) = near.read(&mut bytes) {
                    ears.lock().expect("ears").extend_from_slice(&bytes[..count]);
                    std::io::Write::write_all(&mut far, &bytes[..count]).expect("passing on");
                }
            });
        }
    });
    (address, heard)
}

#[tokio::test(flavor = "multi_thread")]
async fn with_certificates_everything_travels_sealed() {
    let authority = Authority::new("one");
    let mut hosts = Vec::new();
    for number in 1..=3 {
        let tls = authority.tls(&format!("host-{number}"));
        hosts.push(sealed(number, 2, Some(tls)).await);
    }
    for host in &hosts[1..] {
        host.serve_disk().await;
    }
    let all: Vec<(HostId, String)> = hosts
        .iter()
        .map(|host| (host.me.host, host.me.name.clone()))
        .collect();
    for host in &hosts {
        for (other, name) in &all {
            host.links.set_peer(*other, name, None);
        }
    }
    let (proxy, heard) = listening_proxy(hosts[1].address);
    hosts[0].know(&hosts[1], Some(proxy));
    hosts[0].know(&hosts[2], Some(hosts[2].address));
    let vdi = VdiId(1);
    hosts[0].open_vdi(vdi, &[2, 3], &[]).await;
    // A block, what does not fit one record, and what does not fit one send; again and again over the same memory.
    let mut right = vec![0; 8 << 20];
    for (round, length) in [4096, 512, 100 << 10, 5 << 20, 4096, 3 << 20]
        .into_iter()
        .enumerate()
    {
        let at = round * 517 * 1024;
        let bytes = pattern(round, length);
        right[at..at + length].copy_from_slice(&bytes);
        hosts[0].write(vdi, at as u64, &bytes).await;
        assert!(hosts[0].read(vdi, 0, 8 << 20).await == right, "round {round}");
    }
    assert!(matches!(hosts[0].op(vdi, Op::Flush).await, Ok(Outcome::Done)));
    let heard = std::mem::take(&mut *heard.lock().expect("ears"));
    let says = |word: &[u8]| heard.windows(word.len()).any(|bytes| bytes == word);
    assert!(heard.len() > 8 << 20, "{} B heard", heard.len());
    assert!(!says(b"WFTL") && !says(b"host-") && !says(&right[..16]));
    stop(hosts).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_right_certificate_is_refused_by_name_and_the_others_go_on() {
    let (authority, another) = (Authority::new("one"), Authority::new("another"));
    let mut host = sealed(1, 1, Some(authority.tls("host-1"))).await;
    host.links.set_peer(HostId(2), "host-2", None);
    let expired = authority.files_until("host-2", 2021);
    let of_another = TlsFiles {
        // It believes who it calls, who does not believe it.
        authority: [authority.pem.as_bytes(), another.pem.as_bytes()].concat(),
        ..another.files("host-2")
    };
    let trusts_another = TlsFiles {
        authority: another.pem.clone().into_bytes(),
        ..authority.files("host-2")
    };
    let of_host_3 = authority.tls("host-3");
    // What the caller has; what is said where it calls; what it is told; what is said when it is called.
    let cases: [(Option<Arc<Tls>>, &str, &str, &str); 5] = [
        (
            None,
            "host 'host-1' asks host 'host-2' for TLS: it does not speak TLS",
            "host 'host-1' asks host 'host-2' for TLS: it does not speak TLS",
            "TLS: the other end closed the connection; is TLS set there?",
        ),
        (
            Some(of_host_3),
            "host 'host-1' asks host 'host-2' for TLS: invalid peer certificate: certificate not valid for name \"host-2\"",
            "host 'host-1' asks host 'host-2' for TLS: invalid peer certificate: certificate not valid for name \"host-2\"",
            "TLS: invalid peer certificate: certificate not valid for name \"host-2\"",
        ),
        (
            Some(ready(&of_another, "host-2")),
            "TLS: invalid peer certificate: UnknownIssuer",
            "received fatal alert",
            "TLS: invalid peer certificate: UnknownIssuer",
        ),
        (
            Some(ready(&trusts_another, "host-2")),
            "received fatal alert",
            "TLS: invalid peer certificate: UnknownIssuer",
            "received fatal alert",
        ),
        (
            Some(ready(&expired, "host-2")),
            "TLS: invalid peer certificate: certificate expired",
            "received fatal alert",
            "TLS: invalid peer certificate: certificate expired",
        ),
    ];
    for (tls, refused, told, called) in cases {
        let mut other = sealed(2, 1, tls).await;
        other
            .links
            .set_peer(HostId(1), "host-1", Some(&host.address.to_string()));
        let says = |news: &LinkNews, words: &str| match news {
            LinkNews::Refused(said) | LinkNews::Down(said) => said.contains(words) && !said.contains('\n'),
            LinkNews::Up => false,
        };
        let news = host.hear(|news| matches!(news, LinkNews::Refused(_))).await;
        assert!(says(&news, refused), "{news:?}, not {refused}");
        let news = other.hear(|news| matches!(news, LinkNews::Down(_))).await;
        assert!(says(&news, told), "{news:?}, not {told}");
        let unreached = other.links.unreached(HostId(1));
        assert!(unreached.is_some_and(|reason| reason.contains(told)));
        other.links.forget_peer(HostId(1));
        host.links
            .set_peer(HostId(2), "host-2", Some(&other.address.to_string()));
        let news = host.hear(|news| matches!(news, LinkNews::Down(_))).await;
        assert!(says(&news, called), "{news:?}, not {called}");
        host.links.set_peer(HostId(2), "host-2", None);
        assert_eq!(host.links().await.len(), 0);
        other.stop().await;
    }
    // A host with a good certificate that says it is another host, by its own name: the records have that host's name.
    let liar = sealed(2, 1, None).await;
    let me = Identity {
        name: "host-3".to_owned(),
        ..identity(2, 7)
    };
    let (reports, _) = unbounded_channel();
    let handles = liar.planes.handles.clone();
    let links = Links::new(me, handles, SILENCE, Some(authority.tls("host-3")), reports);
    links.set_peer(HostId(1), "host-1", Some(&host.address.to_string()));
    let news = host.hear(|news| matches!(news, LinkNews::Refused(_))).await;
    let refused = "certificate not valid for name \"host-2\"";
    assert!(
        matches!(&news, LinkNews::Refused(said) if said.contains(refused)),
        "{news:?}"
    );
    links.forget_peer(HostId(1));
    liar.stop().await;
    let mut good = sealed(2, 1, Some(authority.tls("host-2"))).await;
    good.links
        .set_peer(HostId(1), "host-1", Some(&host.address.to_string()));
    good.is_up().await;
    assert_eq!(good.links.unreached(HostId(1)), None);
    host.stop().await;
    good.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_are_renewed_are_those_of_the_next_links() {
    let authority = Authority::new("one");
    let mut one = sealed(1, 1, Some(authority.tls("host-1"))).await;
    let mut two = sealed(2, 1, Some(authority.tls("host-2"))).await;
    one.links.set_peer(HostId(2), "host-2", None);
    two.know(&one, Some(one.address));
    two.is_up().await;
    two.serve_disk().await;
    one.know(&two, Some(two.address));
    one.is_up().await;
    one.open_vdi(VdiId(1), &[2], &[]).await;
    let expired = authority.files_until("host-2", 2021);
    two.links.renew_tls(ready(&expired, "host-2"));
    // Those that are there go on.
    let bytes = pattern(1, 64 << 10);
    one.write(VdiId(1), 0, &bytes).await;
    assert!(one.read(VdiId(1), 0, 64 << 10).await == bytes);
    // Called again, by a name that leaves everything else as it is: an address written in another way.
    let again = format!("localhost:{}", two.address.port());
    one.links.forget_peer(HostId(2));
    one.links.set_peer(HostId(2), "host-2", Some(&again));
    let expired =
        |news: &LinkNews| matches!(news, LinkNews::Down(said) if said.contains("certificate expired"));
    one.hear(expired).await;
    assert!(one.links.unreached(HostId(2)).is_some());
    two.links.renew_tls(authority.tls("host-2"));
    one.is_up().await;
    assert_eq!(one.links.unreached(HostId(2)), None);
    one.stop().await;
    two.stop().await;
}

/// A handshake has the same time as a greeting, on both ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_that_goes_nowhere_ends() {
    let authority = Authority::new("one");
    let mut host = sealed(1, 1, Some(authority.tls("host-1"))).await;
    let mut caller = std::net::TcpStream::connect(host.address).expect("a connection");
    // The head of a record of 512 bytes, and no more of it.
    std::io::Write::write_all(&mut caller, &[HANDSHAKE, 3, 1, 2, 0]).expect("sent");
    let mute = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = mute.local_addr().expect("its address").to_string();
    host.links.set_peer(HostId(2), "host-2", Some(&address));
    let (mut refused, mut down) = (false, false);
    while !refused || !down {
        let news = host.hear(|news| *news != LinkNews::Up).await;
        match news {
            LinkNews::Refused(said) if said == "no greeting within 5 s" => refused = true,
            LinkNews::Down(said) if said == "no greeting within 5 s" => down = true,
            other => panic!("{other:?}"),
        }
    }
    let ended = caller.read(&mut [0; 16]);
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    host.stop().await;
}

#[test]
fn files_that_make_no_tls_are_refused_by_setting() {
    let authority = Authority::new("one");
    let good = authority.files("host-1");
    assert!(Tls::new(&good, "host-1").is_ok());
    let refused = |files: TlsFiles, host| {
        let refused = Tls::new(&files, host).err().expect("refused");
        refused.to_string()
    };
    let with = |change: &dyn Fn(&mut TlsFiles)| {
        let mut files = good.clone();
        change(&mut files);
        refused(files, "host-1")
    };
    let no_pem = || b"none".to_vec();
    for (said, words) in [
        (
            with(&|files| files.authority = no_pem()),
            "cluster.tls_ca': no certificate",
        ),
        (
            with(&|files| files.certificate = no_pem()),
            "cluster.tls_certificate': no certificate",
        ),
        (with(&|files| files.key = no_pem()), "cluster.tls_key'"),
        (
            with(&|files| files.key = authority.files("host-1").key),
            "cluster.tls_key'",
        ),
        (refused(authority.files("host-1"), "host-1."), "cannot be a name"),
        (refused(good.clone(), "host-2"), "not valid for name \"host-2\""),
    ] {
        assert!(said.contains(words), "{said}");
    }
    assert_eq!(format!("{good:?}"), "TlsFiles");
}
