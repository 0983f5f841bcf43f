//! The device as its guest sees it: feature bits and configuration space.

use std::sync::atomic::{AtomicU64, Ordering};

use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::api::{DeviceConfig, DeviceId, SERIAL_BYTES, TRANSFER_BYTES_MAX};

/// `struct virtio_blk_config` up to and with `write_zeroes_may_unmap` and its padding.
pub(crate) const CONFIG_BYTES: usize = 60;

/// Where the guest switches the write cache, if CONFIG_WCE was agreed on.
pub(crate) const CONFIG_WRITEBACK_OFFSET: usize = 32;

/// What all connections to a device share.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) id: DeviceId,
    pub(crate) config: DeviceConfig,
    bytes: AtomicU64,
}

impl Device {
    pub(crate) fn new(id: DeviceId, config: DeviceConfig) -> Device {
        Device {
            id,
            bytes: AtomicU64::new(config.bytes),
            config,
        }
    }

    /// The size now.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    pub(crate) fn resize(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Release);
    }

    pub(crate) fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_MQ,
        ];
        if self.config.is_read_only {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            if self.config.discard_bytes_max > 0 {
                bits.push(VIRTIO_BLK_F_DISCARD);
            }
            if self.config.write_zeroes_bytes_max > 0 {
                bits.push(VIRTIO_BLK_F_WRITE_ZEROES);
            }
        }
        bits.iter()
            .fold(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(), |all, bit| {
                all | 1 << bit
            })
    }

    pub(crate) fn protocol_features() -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    /// Virtio 1.2, 5.2.4.
    pub(crate) fn config_space(&self, is_write_back: bool) -> [u8; CONFIG_BYTES] {
        let config = &self.config;
        let sectors = |bytes: u64| (bytes / 512).min(u64::from(u32::MAX)) as u32;
        let in_blocks = |bytes: u64| bytes / u64::from(config.sector_bytes);
        // Header and status take two descriptors of a chain that is not indirect.
        let segments_max = u32::from(config.queue_size) - 2;
        // So that no request made within the limits is longer than what we take.
        let segment_bytes_max = (TRANSFER_BYTES_MAX / u64::from(segments_max)) as u32 & !4095;
        let physical_exponent = config.physical_block_bytes.ilog2() - config.sector_bytes.ilog2();

        let mut space = [0; CONFIG_BYTES];
        let mut put =
            |offset: usize, bytes: &[u8]| space[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.bytes() / 512).to_le_bytes());
        put(8, &segment_bytes_max.to_le_bytes());
        put(12, &segments_max.to_le_bytes());
        put(20, &config.sector_bytes.to_le_bytes());
        put(24, &[physical_exponent as u8, 0]);
        let physical_in_blocks = in_blocks(u64::from(config.physical_block_bytes)) as u16;
        put(26, &physical_in_blocks.to_le_bytes());
        put(
            28,
            &(in_blocks(u64::from(config.optimal_io_bytes)) as u32).to_le_bytes(),
        );
        put(CONFIG_WRITEBACK_OFFSET, &[u8::from(is_write_back)]);
        put(34, &config.queues.to_le_bytes());
        if !config.is_read_only && config.discard_bytes_max > 0 {
            put(36, &sectors(config.discard_bytes_max).to_le_bytes());
            put(40, &1u32.to_le_bytes());
            put(44, &(config.discard_granularity_bytes / 512).max(1).to_le_bytes());
        }
        if !config.is_read_only && config.write_zeroes_bytes_max > 0 {
            put(48, &sectors(config.write_zeroes_bytes_max).to_le_bytes());
            put(52, &1u32.to_le_bytes());
            put(56, &[1]);
        }
        space
    }

    /// The answer to GET_ID, padded with zeros.
    pub(crate) fn serial(&self) -> [u8; SERIAL_BYTES] {
        let mut serial = [0; SERIAL_BYTES];
        let bytes = self.config.serial.as_bytes();
        let length = bytes.len().min(SERIAL_BYTES);
        serial[..length].copy_from_slice(&bytes[..length]);
        serial
    }
}
