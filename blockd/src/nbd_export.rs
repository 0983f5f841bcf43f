//! A VDI as an NBD export: requests go to its plane's mailbox, answers come back over a channel each.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use edge::uring::{Buf, BufMut, Pool};
use nbd::{Export, ExportError, ExportInfo, Extent, Part};
use tokio::sync::oneshot;
use types::{Lineage, VdiId};
use vdi::{Op, Outcome, ReadPart, VdiError};

use crate::plane::{Command, PlaneHandle};

/// One VDI, as NBD clients see it.
pub struct VdiExport {
    vdi: VdiId,
    name: String,
    /// What a snapshot reads; absent: the VDI as it is.
    view: Option<Lineage>,
    plane: PlaneHandle,
    pool: Pool,
    bytes: Arc<AtomicU64>,
    sector_bytes: u32,
    is_read_only: bool,
}

impl VdiExport {
    /// `bytes` is shared with the daemon, which raises it when the VDI grows.
    pub fn new(
        vdi: VdiId,
        name: String,
        view: Option<Lineage>,
        plane: PlaneHandle,
        pool: Pool,
        bytes: Arc<AtomicU64>,
        sector_bytes: u32,
        is_read_only: bool,
    ) -> VdiExport {
        VdiExport {
            vdi,
            name,
            view,
            plane,
            pool,
            bytes,
            sector_bytes,
            is_read_only,
        }
    }

    async fn ask(&self, op: Op<Buf>) -> Result<Outcome<Buf>, ExportError> {
        let (reply, answer) = oneshot::channel();
        self.plane.send(Command::Request {
            vdi: self.vdi,
            op,
            reply,
        });
        match answer.await {
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(error)) => Err(in_nbd_words(&error)),
            Err(_) => Err(ExportError::Closing),
        }
    }

    async fn done(&self, op: Op<Buf>) -> Result<(), ExportError> {
        self.ask(op).await.map(|_| ())
    }
}

fn in_nbd_words(error: &VdiError) -> ExportError {
    match error {
        VdiError::OutOfRange { .. } | VdiError::Misaligned { .. } => ExportError::Invalid(error.to_string()),
        VdiError::Unreadable { .. } => ExportError::Io(error.to_string()),
        VdiError::Closed => ExportError::Closing,
    }
}

impl Export for VdiExport {
    type Buffer = BufMut;
    type Data = Buf;

    fn info(&self) -> ExportInfo {
        ExportInfo {
            bytes: self.bytes.load(Ordering::Acquire),
            sector_bytes: self.sector_bytes,
            is_read_only: self.is_read_only,
            description: format!("Weft VDI {}", self.name),
        }
    }

    async fn buffer(&self, length: usize) -> BufMut {
        self.pool.take(length)
    }

    async fn read(&self, offset: u64, length: u32) -> Result<Vec<Part<Buf>>, ExportError> {
        match self
            .ask(Op::Read {
                offset,
                length: u64::from(length),
                of: self.view.clone(),
            })
            .await?
        {
            Outcome::Read(parts) => Ok(parts
                .into_iter()
                .map(|part| match part {
                    ReadPart::Data(data) => Part::Data(data),
                    ReadPart::Zeros(bytes) => Part::Zeros(bytes),
                })
                .collect()),
            Outcome::Done | Outcome::Extents(_) => unreachable!("a read is answered with content"),
        }
    }

    async fn write(&self, offset: u64, data: BufMut, fua: bool) -> Result<(), ExportError> {
        self.done(Op::Write {
            offset,
            data: data.freeze(),
            fua,
        })
        .await
    }

    async fn flush(&self) -> Result<(), ExportError> {
        self.done(Op::Flush).await
    }

    async fn trim(&self, offset: u64, length: u32, fua: bool) -> Result<(), ExportError> {
        self.done(Op::Discard {
            offset,
            length: u64::from(length),
        })
        .await?;
        if fua { self.flush().await } else { Ok(()) }
    }

    async fn write_zeroes(&self, offset: u64, length: u32, fua: bool, _: bool) -> Result<(), ExportError> {
        self.done(Op::WriteZeroes {
            offset,
            length: u64::from(length),
            fua,
        })
        .await
    }

    async fn extents(&self, offset: u64, length: u32) -> Result<Vec<Extent>, ExportError> {
        match self
            .ask(Op::Extents {
                offset,
                length: u64::from(length),
                of: self.view.clone(),
            })
            .await?
        {
            Outcome::Extents(extents) => Ok(extents
                .into_iter()
                .map(|extent| Extent {
                    length: extent.length,
                    is_data: extent.is_data,
                })
                .collect()),
            Outcome::Done | Outcome::Read(_) => {
                unreachable!("a question for extents is answered with extents")
            }
        }
    }
}
