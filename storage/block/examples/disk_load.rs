//! A load on a raw disk or file past the page cache: `disk_load PATH read|write random|sequential BLOCK DEPTH REQUESTS`.
//! So many requests of `BLOCK` bytes are made, `DEPTH` at a time, and how long that took is printed.
#![forbid(unsafe_code)]

use std::error::Error;
use std::time::Instant;

use block::{Begun, CacheMode, ChainFile, Disk, Format, OpenOptions, Ring, use_direct_io};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path, way, order, block, depth, requests] = args.as_slice() else {
        return Err("usage: disk_load PATH read|write random|sequential BLOCK DEPTH REQUESTS".into());
    };
    let (block, depth, requests): (u64, u16, u64) = (block.parse()?, depth.parse()?, requests.parse()?);
    let is_write = way == "write";
    let file = std::fs::OpenOptions::new().read(true).write(is_write).open(path)?;
    use_direct_io(&file)?;
    let file = ChainFile { file, path_label: path.into(), format: Format::Raw, extents: Vec::new() };
    let options =
        OpenOptions { read_only: !is_write, format: Format::Raw, cache: CacheMode::None, ..OpenOptions::default() };
    let disk = Disk::open(vec![file], &options)?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), usize::from(depth) * block as usize)])?;
    let mut ring = Ring::new(depth, memory.clone())?;
    let places = (disk.size_bytes() / block).max(1);
    let mut seed = 1u64;
    let mut begin = |ring: &mut Ring<()>, number: u64, tag: u64| -> Result<(), Box<dyn Error>> {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let place = if order == "random" { (seed >> 20) % places } else { number % places };
        let slice = memory.get_slice(GuestAddress(tag * block), block as usize)?;
        let begun = match is_write {
            true => ring.write(&disk, place * block, &[slice], tag),
            false => ring.read(&disk, place * block, &[slice], tag),
        };
        if begun == Begun::UnderWay { Ok(()) } else { Err(format!("{begun:?} at {place}").into()) }
    };
    let start = Instant::now();
    let mut begun = 0;
    while begun < requests.min(depth.into()) {
        begin(&mut ring, begun, begun)?;
        begun += 1;
    }
    while ring.under_way() > 0 {
        ring.wait()?;
        while let Some(over) = ring.next_over(&disk) {
            if !over.good {
                return Err("a request failed".into());
            }
            if begun < requests {
                begin(&mut ring, begun, over.tag)?;
                begun += 1;
            }
        }
    }
    println!("{requests} requests in {} us, {} system calls", start.elapsed().as_micros(), ring.calls());
    Ok(())
}
