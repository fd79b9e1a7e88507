//! Repeatable random numbers (SplitMix64) with the shapes that find mistakes.

/// A generator; the same seed gives the same numbers everywhere.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// From a seed.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    /// Below `n` (at least 1).
    pub fn below(&mut self, n: u64) -> u64 {
        self.bits() % n.max(1)
    }
    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    /// One of a list.
    pub fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
    /// An integer: an edge value half of the time.
    pub fn integer(&mut self) -> u64 {
        const EDGES: [u64; 16] = [
            0,
            1,
            2,
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x7fff_ffff_ffff_ffff,
            0x8000_0000_0000_0000,
            u64::MAX,
            u64::MAX - 1,
        ];
        match self.below(4) {
            0 => self.pick(&EDGES),
            1 => self.pick(&EDGES).wrapping_add(self.below(5)).wrapping_sub(2),
            2 => self.bits() >> self.below(64),
            _ => self.bits(),
        }
    }
    /// Eight bytes of vector data: integers, singles, doubles, special values.
    pub fn lane(&mut self) -> u64 {
        const SINGLES: [u32; 10] = [
            0,
            0x8000_0000,
            0x3f80_0000,
            0xbf80_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0001,
            0x7f80_0001,
            0x0000_0001,
            0x007f_ffff,
        ];
        const DOUBLES: [u64; 10] = [
            0,
            1 << 63,
            0x3ff0_0000_0000_0000,
            0xbff8_0000_0000_0000,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0001,
            0x7ff0_0000_0000_0001,
            1,
            0x000f_ffff_ffff_ffff,
        ];
        match self.below(6) {
            0 => self.pick(&DOUBLES),
            1 => self.pick(&SINGLES) as u64 | (self.pick(&SINGLES) as u64) << 32,
            2 => ((self.below(2000) as f64 - 1000.0) / 7.0).to_bits(),
            3 => {
                let single = |n: u64| ((n as f32 - 500.0) / 3.0).to_bits() as u64;
                single(self.below(1000)) | single(self.below(1000)) << 32
            }
            4 => self.integer(),
            _ => self.bits(),
        }
    }
}
