//! Changes to inputs, from a seed: what `cargo test` tries without libFuzzer. Blind to coverage, so it finds less,
//! but it runs everywhere and always the same.

/// splitmix64.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// From `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Below `bound`, which is not zero.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// Numbers at which checks turn.
const EDGES: [u64; 12] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    u64::MAX / 2,
    u64::MAX - 4095,
    u64::MAX,
];

/// One to four changes to `input`, at most `length_max` bytes long; `other` is a second input to take pieces from.
#[must_use]
pub fn change(random: &mut Random, input: &[u8], other: &[u8], length_max: usize) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=random.below(4) {
        change_once(random, &mut bytes, other);
    }
    bytes.truncate(length_max);
    bytes
}

fn change_once(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    let at = random.below(bytes.len() + 1);
    let rest = bytes.len() - at;
    match random.below(8) {
        0 if rest > 0 => bytes[at] ^= 1 << random.below(8),
        1 if rest > 0 => bytes[at] = random.next() as u8,
        2 => {
            let edge = EDGES[random.below(EDGES.len())];
            let width = 1 << random.below(4);
            let edge = if random.below(2) == 0 {
                edge.to_le_bytes()[..width].to_vec()
            } else {
                edge.to_be_bytes()[8 - width..].to_vec()
            };
            let width = width.min(rest);
            bytes[at..at + width].copy_from_slice(&edge[..width]);
        }
        3 => bytes.truncate(at),
        4 if rest > 0 => drop(bytes.drain(at..at + 1 + random.below(rest))),
        5 => {
            let count = 1 + random.below(16);
            let byte = random.next() as u8;
            bytes.splice(at..at, std::iter::repeat_n(byte, count));
        }
        6 if !other.is_empty() => {
            let from = random.below(other.len());
            let count = 1 + random.below(other.len() - from);
            bytes.splice(at..at, other[from..from + count].iter().copied());
        }
        _ if rest > 0 => {
            let count = 1 + random.below(rest);
            let piece = bytes[at..at + count].to_vec();
            let to = random.below(bytes.len() + 1);
            bytes.splice(to..to, piece);
        }
        _ => bytes.push(random.next() as u8),
    }
}
