//! Arbitrary bytes against a whole connection, over a pipe in memory.

use proptest::prelude::*;
use tokio::io::{DuplexStream, ReadHalf, WriteHalf, duplex, split};

use super::*;
use crate::export::{ExportError, Extent, Part};
use crate::proto::{OPTION_MAGIC, PAYLOAD_BYTES_MAX, REQUEST_MAGIC, option};

impl Stream for DuplexStream {
    type Reader = ReadHalf<DuplexStream>;
    type Writer = WriteHalf<DuplexStream>;
    fn halves(self) -> (Self::Reader, Self::Writer) {
        split(self)
    }
}

/// Holds nothing, and checks what the trait promises its implementors.
struct Nothing;

const BYTES: u64 = 1 << 20;

fn check(offset: u64, length: u32) {
    assert!(
        length > 0 && offset + u64::from(length) <= BYTES,
        "{length} at {offset}"
    );
    assert!(
        offset.is_multiple_of(512) && length.is_multiple_of(512),
        "{length} at {offset}"
    );
}

impl Export for Nothing {
    type Buffer = Vec<u8>;
    type Data = Vec<u8>;

    fn info(&self) -> ExportInfo {
        ExportInfo {
            bytes: BYTES,
            sector_bytes: 512,
            is_read_only: false,
            description: String::new(),
        }
    }
    async fn buffer(&self, length: usize) -> Vec<u8> {
        assert!(length <= PAYLOAD_BYTES_MAX as usize);
        vec![0; length]
    }
    async fn read(&self, offset: u64, length: u32) -> Result<Vec<Part<Vec<u8>>>, ExportError> {
        check(offset, length);
        Ok(vec![Part::Zeros(length.into())])
    }
    async fn write(&self, offset: u64, data: Vec<u8>, _: bool) -> Result<(), ExportError> {
        check(offset, data.len() as u32);
        Ok(())
    }
    async fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }
    async fn trim(&self, offset: u64, length: u32, _: bool) -> Result<(), ExportError> {
        check(offset, length);
        Err(ExportError::Unsupported)
    }
    async fn write_zeroes(&self, offset: u64, length: u32, _: bool, _: bool) -> Result<(), ExportError> {
        check(offset, length);
        Err(ExportError::NoSpace)
    }
    async fn extents(&self, offset: u64, length: u32) -> Result<Vec<Extent>, ExportError> {
        check(offset, length);
        Ok(vec![])
    }
}

/// Plays `bytes` to a connection and hangs up; how the connection ended.
fn play(bytes: &[u8]) -> Result<(), Ended> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let exports = Exports::new();
        exports.add("", Arc::new(Nothing)).unwrap();
        let is_stopped = watch::Sender::new(false);
        let (ours, theirs) = duplex(64 << 10);
        let serving = serve(theirs, exports, Config::default(), is_stopped.subscribe());
        let (mut reader, mut writer) = split(ours);
        let client = async {
            // The server may hang up in the middle; that is its answer.
            let _ = writer.write_all(bytes).await;
            let _ = writer.shutdown().await;
        };
        let mut sink = tokio::io::sink();
        let listen = tokio::io::copy(&mut reader, &mut sink);
        let (result, (), _) = tokio::join!(serving, client, listen);
        result
    })
}

fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Greeting's answer, structured replies, and GO to the default export.
fn opening() -> Vec<u8> {
    [
        3_u32.to_be_bytes().to_vec(),
        option_bytes(option::STRUCTURED_REPLY, &[]),
        option_bytes(
            option::SET_META_CONTEXT,
            b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation",
        ),
        option_bytes(option::GO, &[0; 6]),
    ]
    .concat()
}

fn request() -> impl Strategy<Value = Vec<u8>> {
    let small = (0_u64..2200, 0_u32..40).prop_map(|(offset, length)| (offset * 512, length * 512));
    let range = prop_oneof![4 => small, 1 => (any::<u64>(), 0_u32..1 << 20)];
    (0_u16..10, 0_u16..40, any::<u64>(), range, any::<bool>()).prop_map(
        |(kind, flags, cookie, (offset, length), is_whole)| {
            let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
            bytes.extend_from_slice(&flags.to_be_bytes());
            bytes.extend_from_slice(&kind.to_be_bytes());
            bytes.extend_from_slice(&cookie.to_be_bytes());
            bytes.extend_from_slice(&offset.to_be_bytes());
            bytes.extend_from_slice(&length.to_be_bytes());
            if kind == 1 && is_whole {
                bytes.resize(bytes.len() + length as usize, 0x77);
            }
            bytes
        },
    )
}

#[test]
fn the_opening_opens() {
    assert!(matches!(
        play(&[opening(), vec![0; 28]].concat()),
        Err(Ended::BadMagic(0))
    ));
    assert!(matches!(play(&opening()), Ok(())));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_bytes_end_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(!matches!(play(&bytes), Err(Ended::Panicked)));
        prop_assert!(!matches!(play(&[opening(), bytes].concat()), Err(Ended::Panicked)));
    }

    #[test]
    fn any_requests_end_without_a_panic(requests in proptest::collection::vec(request(), 1..30)) {
        let result = play(&[opening(), requests.concat()].concat());
        prop_assert!(!matches!(result, Err(Ended::Panicked | Ended::GraceOver(_))), "{:?}", result);
    }
}
