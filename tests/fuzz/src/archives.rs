//! Archives that a user names: OVA.

use image::ova::{self, manifest, ovf, tar};

/// An archive; its headers get right checksums first, so that changed fields are looked at. The same bytes as a
/// descriptor, and as a manifest.
pub fn ova(data: &[u8]) -> bool {
    let text = String::from_utf8_lossy(data);
    let is_text = ovf::parse::<()>(&text).is_ok_and(|found| !found.disks.is_empty())
        | manifest::parse::<()>(&text).is_ok_and(|found| !found.is_empty());
    let mut archive = data.to_vec();
    for block in
        archive.chunks_exact_mut(tar::BLOCK_BYTES as usize).filter(|block| block.get(257..262) == Some(b"ustar"))
    {
        mend_checksum(block);
    }
    let _ = ova::probe(&archive);
    is_text | opens(data) | opens(&archive)
}

fn opens(archive: &[u8]) -> bool {
    let bytes = archive.len() as u64;
    let mut read = |at: u64, out: &mut [u8]| -> Result<(), &str> {
        // Nothing outside the archive is asked for.
        let from = usize::try_from(at).unwrap_or(usize::MAX);
        let part = from.checked_add(out.len()).and_then(|end| archive.get(from..end)).ok_or("outside")?;
        out.copy_from_slice(part);
        Ok(())
    };
    match ova::open(bytes, &mut read) {
        Ok(found) => {
            let inside = |member: &ova::Member| member.offset.checked_add(member.bytes).is_some_and(|end| end <= bytes);
            assert!(found.members.iter().all(inside) && found.disks.iter().all(|disk| inside(&disk.member)));
            true
        }
        Err(ova::OvaError::Read(reason)) => panic!("{reason}"),
        Err(_) => false,
    }
}

/// POSIX.1-2017, "ustar Interchange Format": the sum of all bytes, with blanks for its own.
fn mend_checksum(block: &mut [u8]) {
    block.iter_mut().skip(148).take(8).for_each(|byte| *byte = b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    for (target, byte) in block.iter_mut().skip(148).zip(format!("{sum:06o}\0").as_bytes()) {
        *target = *byte;
    }
}
