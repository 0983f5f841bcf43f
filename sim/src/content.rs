//! Content that says where it belongs and which write made it.
//!
//! Each 512 B sector is a function of (address, version): an oracle that is handed any sector can tell which
//! write it came from, or that it came from none. Version 0 is zeros: never written, cleared or discarded.

use types::{BLOCK_BYTES, HeapBlock};

use crate::medium::SECTOR_BYTES;
use crate::mix;

/// Writes the sector of `version` at `address` into `sector`.
pub fn fill_sector(address: u64, version: u64, sector: &mut [u8]) {
    assert_eq!(sector.len() as u64, SECTOR_BYTES, "a sector");
    if version == 0 {
        sector.fill(0);
        return;
    }
    let base = mix(mix(address) ^ version);
    for (i, word) in sector.chunks_mut(8).enumerate() {
        let value = match i {
            0 => version,
            i => base.wrapping_add(i as u64).rotate_left(i as u32),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// Which version of `address` this sector holds; `None` if it is no content of that address at all.
#[must_use]
pub fn sector_version(address: u64, sector: &[u8]) -> Option<u64> {
    let version = u64::from_le_bytes(sector[..8].try_into().expect("eight bytes"));
    let mut expected = [0; SECTOR_BYTES as usize];
    fill_sector(address, version, &mut expected);
    (expected == sector).then_some(version)
}

/// The content of whole sectors from `address` on, all of one version. Addresses of neighbouring sectors differ
/// by one.
#[must_use]
pub fn sectors(address: u64, count: u64, version: u64) -> HeapBlock {
    let mut bytes = vec![0; (count * SECTOR_BYTES) as usize];
    for (i, sector) in bytes.chunks_mut(SECTOR_BYTES as usize).enumerate() {
        fill_sector(address + i as u64, version, sector);
    }
    HeapBlock::new(&bytes)
}

/// The one version of all sectors of a block at `address`; `None` if they disagree or are foreign.
#[must_use]
pub fn block_version(address: u64, block: &[u8]) -> Option<u64> {
    assert_eq!(block.len() as u64, BLOCK_BYTES, "a block");
    let mut versions = block
        .chunks(SECTOR_BYTES as usize)
        .enumerate()
        .map(|(i, sector)| sector_version(address + i as u64, sector));
    let first = versions.next().flatten()?;
    versions.all(|version| version == Some(first)).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::Payload;

    #[test]
    fn content_names_its_place_and_its_write() {
        let block = sectors(80, 8, 5);
        assert_eq!(block_version(80, block.bytes()), Some(5));
        assert_eq!(block_version(88, block.bytes()), None);
        assert_eq!(block_version(80, sectors(80, 8, 0).bytes()), Some(0));
        let torn = block.overlay(1024, &sectors(82, 1, 4));
        assert_eq!(block_version(80, torn.bytes()), None);
        assert_eq!(sector_version(82, &torn.bytes()[1024..1536]), Some(4));
        let mut rotten = block.bytes().to_vec();
        rotten[700] ^= 1;
        assert_eq!(block_version(80, &rotten), None);
    }
}
