//! A small NBD client that tells a broken connection from an I/O error: what the kill tests need and ready-made
//! clients hide. Simple replies; one request at a time or several in flight, as the caller sends and receives.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const EXPORT_NAME: u32 = 1;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// Commands of the protocol (NBD doc/proto.md, "Request types").
pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;

pub struct NbdClient {
    stream: UnixStream,
    pub bytes: u64,
}

impl NbdClient {
    /// Connects and chooses the default export.
    pub fn connect(path: &Path) -> io::Result<NbdClient> {
        let mut stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(super::PATIENCE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting[..8], b"NBDMAGIC");
        let mut hello = Vec::new();
        hello.extend(3u32.to_be_bytes());
        hello.extend(OPTION_MAGIC);
        hello.extend(EXPORT_NAME.to_be_bytes());
        hello.extend(0u32.to_be_bytes());
        stream.write_all(&hello)?;
        let mut size = [0; 10];
        stream.read_exact(&mut size)?;
        Ok(NbdClient {
            stream,
            bytes: u64::from_be_bytes(size[..8].try_into().expect("8 bytes")),
        })
    }

    /// Sends a request; `handle` comes back with its reply.
    pub fn send(
        &mut self,
        command: u16,
        handle: u64,
        offset: u64,
        length: u32,
        data: &[u8],
    ) -> io::Result<()> {
        let mut request = Vec::with_capacity(28 + data.len());
        request.extend(REQUEST_MAGIC.to_be_bytes());
        request.extend(0u16.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(handle.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request)
    }

    /// The next reply: its handle and NBD error. Data of a read must be taken with [`Self::data`] after a 0.
    pub fn receive(&mut self) -> io::Result<(u64, u32)> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        assert_eq!(u32::from_be_bytes(reply[..4].try_into().expect("4")), REPLY_MAGIC);
        let error = u32::from_be_bytes(reply[4..8].try_into().expect("4"));
        Ok((u64::from_be_bytes(reply[8..].try_into().expect("8")), error))
    }

    pub fn data(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data)?;
        Ok(data)
    }

    pub fn read(&mut self, offset: u64, length: u32) -> io::Result<Vec<u8>> {
        self.send(READ, 1, offset, length, &[])?;
        let (_, error) = self.receive()?;
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error as i32));
        }
        self.data(length as usize)
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.send(WRITE, 2, offset, u32::try_from(data.len()).expect("length"), data)?;
        self.done()
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.send(FLUSH, 3, 0, 0, &[])?;
        self.done()
    }

    pub fn trim(&mut self, offset: u64, length: u32) -> io::Result<()> {
        self.send(TRIM, 4, offset, length, &[])?;
        self.done()
    }

    fn done(&mut self) -> io::Result<()> {
        match self.receive()? {
            (_, 0) => Ok(()),
            (_, error) => Err(io::Error::from_raw_os_error(error as i32)),
        }
    }
}
