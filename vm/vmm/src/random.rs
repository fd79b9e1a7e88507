//! Random bytes for guests.

use rustix::rand::{GetRandomFlags, getrandom};

/// The host's random numbers.
pub struct HostRandom;

impl virtio::RandomSource for HostRandom {
    fn fill(&mut self, buffer: &mut [u8]) -> bool {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match getrandom(rest, GetRandomFlags::empty()) {
                Ok(bytes) => done += bytes,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        true
    }
}

/// The same bytes in every run, for a machine that has to be repeatable: SplitMix64. Not secret, which is the point.
pub struct RepeatableRandom(u64);

impl RepeatableRandom {
    /// The stream that every repeatable machine sees.
    pub fn new() -> RepeatableRandom {
        RepeatableRandom(0x5eed)
    }
}

impl Default for RepeatableRandom {
    fn default() -> Self {
        RepeatableRandom::new()
    }
}

impl virtio::RandomSource for RepeatableRandom {
    fn fill(&mut self, buffer: &mut [u8]) -> bool {
        for chunk in buffer.chunks_mut(8) {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let word = (z ^ (z >> 31)).to_le_bytes();
            chunk.iter_mut().zip(word).for_each(|(to, from)| *to = from);
        }
        true
    }
}
