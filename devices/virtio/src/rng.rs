//! Entropy device. VIRTIO 5.4

use guest_ram::Memory;

use crate::chain::{self, Chain};
use crate::model::Model;
use crate::work::{Device, Served};

/// Random bytes for one request; the driver asks again for more.
const REQUEST_BYTES: usize = 4096;

/// Where random bytes come from.
pub trait RandomSource: Send {
    /// Fills `buffer`. False: nothing could be had; the request is answered with no bytes.
    fn fill(&mut self, buffer: &mut [u8]) -> bool;
}

/// What the driver is told.
pub(crate) fn model() -> Model {
    Model { device_type: 4, class: 0x00_ff00, features: 0, queue_sizes: vec![8], config: Vec::new() }
}

/// The working half.
pub(crate) struct Rng {
    source: Box<dyn RandomSource>,
}

impl Rng {
    pub(crate) fn new(source: Box<dyn RandomSource>) -> Rng {
        Rng { source }
    }
}

impl Device for Rng {
    fn serve(&mut self, _index: u16, memory: &Memory, chain: Chain, _again: bool) -> Served {
        let Ok(gathered) = chain::gather(memory, chain) else { return Served::Used(0) };
        let bytes = (chain::length(&gathered.writable) as usize).min(REQUEST_BYTES);
        let mut random = [0; REQUEST_BYTES];
        let random = random.get_mut(..bytes).unwrap_or(&mut []);
        if !self.source.fill(random) {
            return Served::Used(0);
        }
        Served::Used(chain::fill(&gathered.writable, random) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DATA, Rig, WRITE_ONLY, twice};

    struct Sevens(bool);
    impl RandomSource for Sevens {
        fn fill(&mut self, buffer: &mut [u8]) -> bool {
            buffer.fill(7);
            self.0
        }
    }

    #[test]
    fn buffers_are_filled_as_far_as_the_source_gives() {
        twice(|reload| {
            let mut rig = Rig::new(reload, || (model(), Rng::new(Box::new(Sevens(true)))));
            rig.start(1, 0);
            rig.offer(0, &[(DATA, 10, WRITE_ONLY), (DATA + 100, 6, WRITE_ONLY)]);
            assert_eq!((rig.used(0), rig.messages()), (Some(16), vec![0x41]));
            assert_eq!((rig.get(DATA + 9, 2), rig.get(DATA + 105, 2)), (vec![7, 0], vec![7, 0]));
            rig.offer(0, &[(DATA, 65536, WRITE_ONLY)]);
            assert_eq!(rig.used(0), Some(REQUEST_BYTES as u32));
            let mut dry = Rig::new(reload, || (model(), Rng::new(Box::new(Sevens(false)))));
            dry.start(1, 0);
            dry.offer(0, &[(DATA, 10, WRITE_ONLY)]);
            assert_eq!(dry.used(0), Some(0));
        });
    }
}
