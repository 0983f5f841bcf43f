//! A client that says what it is told to, right or wrong. Simple replies only.

use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

pub struct Raw {
    stream: UnixStream,
}

impl Raw {
    /// Connected, with the server's greeting read.
    pub async fn connect(path: &Path) -> Raw {
        let mut raw = Raw {
            stream: UnixStream::connect(path).await.expect("the server listens"),
        };
        let greeting = raw.receive(18).await;
        assert_eq!(greeting, b"NBDMAGICIHAVEOPT\0\x03");
        raw
    }

    /// Haggling, with these client flags.
    pub async fn greet(path: &Path, flags: u32) -> Raw {
        let mut raw = Raw::connect(path).await;
        raw.send(&flags.to_be_bytes()).await;
        raw
    }

    /// In the transmission phase.
    pub async fn open(path: &Path, name: &str) -> Raw {
        let mut raw = Raw::greet(path, 3).await;
        raw.go(name).await;
        raw
    }

    /// The connection itself, for who speaks and listens at once.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("the server takes it");
    }

    pub async fn receive(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.stream
            .read_exact(&mut bytes)
            .await
            .expect("the server says more");
        bytes
    }

    /// The server hangs up, without another word.
    pub async fn expect_end(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest).await {
            Ok(_) => assert!(rest.is_empty(), "the server still says {rest:?}"),
            // What we sent was not all read.
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }

    pub async fn option_header(&mut self, option: u32, length: u32) {
        let header = [&b"IHAVEOPT"[..], &option.to_be_bytes(), &length.to_be_bytes()].concat();
        self.send(&header).await;
    }

    pub async fn option(&mut self, option: u32, data: &[u8]) {
        self.option_header(option, data.len() as u32).await;
        self.send(data).await;
    }

    /// Type and body of the next reply to an option.
    pub async fn option_reply(&mut self) -> (u32, Vec<u8>) {
        let head = self.receive(20).await;
        let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        let body = self.receive(number(16) as usize).await;
        (number(12), body)
    }

    /// GO with a request for block sizes; the export's size.
    pub async fn go(&mut self, name: &str) -> u64 {
        let data = [
            &(name.len() as u32).to_be_bytes()[..],
            name.as_bytes(),
            &[0, 1, 0, 3],
        ]
        .concat();
        self.option(7, &data).await;
        let mut bytes = 0;
        loop {
            match self.option_reply().await {
                (1, _) => return bytes,
                (3, body) if body[..2] == [0, 0] => {
                    bytes = u64::from_be_bytes(body[2..10].try_into().unwrap());
                }
                (3, _) => {}
                other => panic!("GO is answered with {other:x?}"),
            }
        }
    }

    pub async fn request(&mut self, kind: u16, flags: u16, cookie: u64, offset: u64, length: u32) {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        self.send(&bytes).await;
    }

    /// Errno and cookie.
    pub async fn simple_reply(&mut self) -> (u32, u64) {
        let head = self.receive(16).await;
        assert_eq!(head[..4], 0x6744_6698_u32.to_be_bytes());
        let errno = u32::from_be_bytes(head[4..8].try_into().unwrap());
        (errno, u64::from_be_bytes(head[8..].try_into().unwrap()))
    }

    pub async fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        self.request(0, 0, 77, offset, length).await;
        match self.simple_reply().await {
            (0, 77) => Ok(self.receive(length as usize).await),
            (errno, 77) => Err(errno),
            (_, other) => panic!("a reply to {other}"),
        }
    }
}
