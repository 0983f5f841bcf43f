//! The virtio-blk request in a chain: its header, its place and size, and whether it may be passed on.
//!
//! Virtio 1.2, 5.2.6. Nothing is assumed of the framing (2.7.4): the header is the first 16 readable bytes, the
//! status the last writable one, wherever the descriptors' borders are.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::api::{DeviceConfig, TRANSFER_BYTES_MAX};
use crate::chain::{Chain, Memory};

pub(crate) const HEADER_BYTES: u64 = 16;
const RANGE_BYTES: u64 = 16;

/// The unit of all positions in requests, whatever the logical sector is.
const POSITION_BYTES: u64 = 512;

/// WRITE_ZEROES: the device may deallocate. We do so in any case.
const FLAG_UNMAP: u32 = 1;

/// The last byte of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// A request that is whole, aligned and inside the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Read {
        offset: u64,
        length: u64,
    },
    Write {
        offset: u64,
        length: u64,
    },
    Flush,
    Discard {
        offset: u64,
        length: u64,
    },
    WriteZeroes {
        offset: u64,
        length: u64,
    },
    Serial,
    /// Nothing to do: zero bytes to move.
    Nothing,
}

/// Reads the request of a chain with at least a status byte; an error is the answer. `bytes` is the disk's size now.
pub(crate) fn parse(
    memory: &Memory,
    chain: &Chain,
    config: &DeviceConfig,
    bytes: u64,
) -> Result<Request, Status> {
    if chain.readable.bytes() < HEADER_BYTES {
        return Err(Status::IoError);
    }
    let mut header = [0; HEADER_BYTES as usize];
    chain.readable.read(memory, 0, &mut header);
    let header = u128::from_le_bytes(header);
    let kind = header as u32;
    let sector = (header >> 64) as u64;
    let data_out = chain.readable.bytes() - HEADER_BYTES;
    let data_in = chain.writable.bytes() - 1;
    match kind {
        VIRTIO_BLK_T_IN => transfer(sector, data_in, config, bytes).map(|place| {
            place.map_or(Request::Nothing, |(offset, length)| Request::Read {
                offset,
                length,
            })
        }),
        VIRTIO_BLK_T_OUT if config.is_read_only => Err(Status::IoError),
        VIRTIO_BLK_T_OUT => transfer(sector, data_out, config, bytes).map(|place| {
            place.map_or(Request::Nothing, |(offset, length)| Request::Write {
                offset,
                length,
            })
        }),
        VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Request::Serial),
        VIRTIO_BLK_T_DISCARD => {
            let limit = config.discard_bytes_max;
            range(memory, chain, data_out, config, bytes, limit, 0).map(|place| {
                place.map_or(Request::Nothing, |(offset, length)| Request::Discard {
                    offset,
                    length,
                })
            })
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            let limit = config.write_zeroes_bytes_max;
            range(memory, chain, data_out, config, bytes, limit, FLAG_UNMAP).map(|place| {
                place.map_or(Request::Nothing, |(offset, length)| Request::WriteZeroes {
                    offset,
                    length,
                })
            })
        }
        _ => Err(Status::Unsupported),
    }
}

type Place = Option<(u64, u64)>;

fn transfer(sector: u64, length: u64, config: &DeviceConfig, bytes: u64) -> Result<Place, Status> {
    if length > TRANSFER_BYTES_MAX {
        return Err(Status::IoError);
    }
    place(sector, length, config, bytes)
}

/// The single range of a DISCARD or WRITE_ZEROES (we offer `max_*_seg` of 1).
fn range(
    memory: &Memory,
    chain: &Chain,
    data_out: u64,
    config: &DeviceConfig,
    bytes: u64,
    limit: u64,
    flags_known: u32,
) -> Result<Place, Status> {
    if limit == 0 {
        return Err(Status::Unsupported);
    }
    if config.is_read_only || data_out != RANGE_BYTES {
        return Err(Status::IoError);
    }
    let mut raw = [0; RANGE_BYTES as usize];
    chain.readable.read(memory, HEADER_BYTES, &mut raw);
    let raw = u128::from_le_bytes(raw);
    let (sector, sectors, flags) = (raw as u64, (raw >> 64) as u32, (raw >> 96) as u32);
    if flags & !flags_known != 0 {
        return Err(Status::Unsupported);
    }
    let length = u64::from(sectors) * POSITION_BYTES;
    if length > limit {
        return Err(Status::IoError);
    }
    place(sector, length, config, bytes)
}

/// Offset and length in bytes, where they are whole sectors inside the disk.
fn place(sector: u64, length: u64, config: &DeviceConfig, bytes: u64) -> Result<Place, Status> {
    let unit = u64::from(config.sector_bytes);
    let offset = sector.checked_mul(POSITION_BYTES).ok_or(Status::IoError)?;
    let end = offset.checked_add(length).ok_or(Status::IoError)?;
    if end > bytes || !offset.is_multiple_of(unit) || !length.is_multiple_of(unit) {
        return Err(Status::IoError);
    }
    Ok((length != 0).then_some((offset, length)))
}
