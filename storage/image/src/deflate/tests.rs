use super::*;

fn inflated(stream: &[u8], bytes: usize, window_bits: u8) -> Vec<u8> {
    let mut decoder = flate2::Decompress::new_with_window_bits(false, window_bits);
    let mut out = vec![0; bytes + 1];
    let status = decoder.decompress(stream, &mut out, flate2::FlushDecompress::Finish).unwrap();
    assert_eq!(status, flate2::Status::StreamEnd);
    assert_eq!((decoder.total_in() as usize, decoder.total_out() as usize), (stream.len(), bytes));
    out.truncate(bytes);
    out
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Random bytes, few symbols, words, long runs, and all of them behind each other.
fn samples() -> Vec<Vec<u8>> {
    let mut rng = Rng(0x5eed);
    let random: Vec<u8> = (0..70_000).map(|_| rng.next() as u8).collect();
    let few: Vec<u8> = (0..70_000).map(|_| b"abc"[(rng.next() % 3) as usize]).collect();
    let words: Vec<String> = (0..300).map(|_| format!("{:x} ", rng.next() % 0xfffff)).collect();
    let text: Vec<u8> = (0..15_000).flat_map(|_| words[(rng.next() % 300) as usize].clone().into_bytes()).collect();
    let runs: Vec<u8> = (0..200).flat_map(|_| vec![rng.next() as u8; (rng.next() % 3000) as usize]).collect();
    let mixed = [&random[..40_000], &text[..60_000], &runs[..50_000], &few, &random].concat();
    let far = [&random[..33_000], &random[..33_000]].concat();
    let high: Vec<u8> = (0..40u8).map(|i| 200 + i % 7).collect(); // short, and in the longer codes of the fixed block
    let mut all = vec![random, few, text, runs, mixed, far, high];
    all.extend((0..20).map(|bytes| b"aaaabcaaaabc01234567"[..bytes].to_vec()));
    all
}

#[test]
fn streams_unpack_to_what_was_packed_whatever_the_window() {
    for window_bits in [9, 12, 15] {
        let mut deflater = Deflater::new(window_bits);
        for sample in samples() {
            let mut out = b"before".to_vec();
            assert!(deflater.deflate(&sample, &mut out, sample.len() + sample.len() / 1000 + 32));
            assert_eq!(&out[..6], b"before");
            assert!(inflated(&out[6..], sample.len(), 15) == sample, "{} bytes", sample.len());
        }
    }
}

#[test]
fn a_decoder_with_the_same_window_needs_no_larger_one() {
    // Output in small pieces makes the decoder use its window, and nothing else, for what lies behind.
    let sample = samples().into_iter().nth(2).unwrap();
    let mut stream = Vec::new();
    assert!(Deflater::new(12).deflate(&sample, &mut stream, sample.len()));
    let mut decoder = flate2::Decompress::new_with_window_bits(false, 12);
    let (mut out, mut piece) = (Vec::new(), [0; 97]);
    loop {
        let before = decoder.total_out();
        let rest = &stream[decoder.total_in() as usize..];
        let status = decoder.decompress(rest, &mut piece, flate2::FlushDecompress::None).unwrap();
        out.extend_from_slice(&piece[..(decoder.total_out() - before) as usize]);
        if status == flate2::Status::StreamEnd {
            break;
        }
    }
    assert!(out == sample);
}

#[test]
fn what_does_not_shrink_is_refused_and_leaves_nothing() {
    let random = samples().swap_remove(0);
    let mut out = vec![7];
    assert!(!Deflater::new(12).deflate(&random, &mut out, random.len() - 1));
    assert_eq!(out, [7]);
}

#[test]
fn size_is_near_zlibs() {
    for sample in samples().iter().take(5).skip(1) {
        let mut peer = Vec::with_capacity(sample.len() + 1000);
        let mut zlib = flate2::Compress::new_with_window_bits(flate2::Compression::new(6), false, 12);
        zlib.compress_vec(sample, &mut peer, flate2::FlushCompress::Finish).unwrap();
        let mut ours = Vec::new();
        Deflater::new(12).deflate(sample, &mut ours, usize::MAX);
        assert!(
            ours.len() * 100 <= peer.len() * 103,
            "{} bytes: {} here, {} there",
            sample.len(),
            ours.len(),
            peer.len()
        );
    }
}

#[test]
fn lengths_and_distances_have_the_codes_of_the_specification() {
    for (length, code) in [(3, 257), (10, 264), (11, 265), (12, 265), (18, 268), (257, 284), (258, 285)] {
        assert_eq!(257 + u16::from(LENGTH_CODES[length - 3]), code, "{length}");
    }
    for (distance, want) in [
        (1, (0, 0, 0)),
        (4, (3, 0, 0)),
        (5, (4, 1, 0)),
        (6, (4, 1, 1)),
        (7, (5, 1, 0)),
        (193, (15, 6, 0)),
        (24577, (29, 13, 0)),
        (32768, (29, 13, 8191)),
    ] {
        assert_eq!(distance_code(distance), want, "{distance}");
    }
}

#[test]
fn checksums_as_rfc_1950_computes_them() {
    for (bytes, want) in [(&b""[..], 1), (b"Wikipedia", 0x11e6_0398), (&[0xff; 100_000], 0x149a_302c)] {
        assert_eq!(adler32(bytes), want);
    }
}

/// Pieces of different nature in one input: where they meet, blocks end, strides change and matches begin.
#[test]
fn random_mixtures_unpack_to_themselves() {
    let mut rng = Rng(42);
    let rounds = if std::env::var_os("VIREO_TEST_LONG").is_some() { 3000 } else { 200 };
    for round in 0..rounds {
        let bytes = if round % 2 == 0 { 65536 } else { 1 + (rng.next() % 70_000) as usize };
        let mut sample = Vec::new();
        while sample.len() < bytes {
            let run = 1 + (rng.next() % 40_000) as usize;
            let mask = rng.next();
            match rng.next() % 5 {
                0 => sample.resize(sample.len() + run, 0),
                1 => sample.extend((0..run).map(|i| b"the quick brown fox "[i % 20])),
                2 => sample.extend((0..run).map(|i| ((i * i) >> 9) as u8)),
                3 => sample.extend((0..run).map(|_| (rng.next() & mask) as u8)),
                _ => sample.extend((0..run).map(|_| rng.next() as u8)),
            }
        }
        sample.truncate(bytes);
        for window_bits in [9, 12, 15] {
            let mut stream = Vec::new();
            assert!(Deflater::new(window_bits).deflate(&sample, &mut stream, usize::MAX));
            assert!(inflated(&stream, bytes, 15) == sample, "round {round}, window {window_bits}");
        }
    }
}
