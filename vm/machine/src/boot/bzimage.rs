//! The header of a bzImage. "BP" is the kernel's Documentation/arch/x86/boot.rst.

use super::BootError;

/// Start of the setup header in the file, and in the boot parameters.
pub(super) const HEADER: usize = 0x1f1;

/// What of a bzImage is needed to start it.
#[derive(Debug)]
pub(super) struct BzImage<'a> {
    /// The setup header, from 0x1f1 to its end.
    pub(super) header: &'a [u8],
    /// Protected-mode code, loaded at `load_address`.
    pub(super) code: &'a [u8],
    /// The packed kernel within `code`.
    pub(super) payload: &'a [u8],
    /// Preferred load address.
    pub(super) load_address: u64,
    /// Memory it needs from there on.
    pub(super) init_bytes: u64,
    /// The highest byte an initrd may take.
    pub(super) initrd_max: u64,
    /// Longest command line, without its terminator.
    pub(super) cmdline_max: usize,
}

fn field<const N: usize>(file: &[u8], at: usize) -> Result<[u8; N], BootError> {
    file.get(at..).and_then(|f| f.first_chunk()).copied().ok_or(BootError::Truncated { what: "bzImage" })
}
fn u32_at(file: &[u8], at: usize) -> Result<u32, BootError> {
    Ok(u32::from_le_bytes(field(file, at)?))
}

/// Reads the header of `file`, which is untrusted.
pub(super) fn parse(file: &[u8]) -> Result<BzImage<'_>, BootError> {
    if file.get(0x202..0x206) != Some(b"HdrS") || file.get(0x1fe..0x200) != Some(&[0x55, 0xaa]) {
        return Err(BootError::UnknownFormat);
    }
    let [minor, major] = field(file, 0x206)?;
    let flags = u16::from_le_bytes(field(file, 0x236)?);
    // 64-bit entry at 0x200: XLF_KERNEL_64, since 2.12.
    if (major, minor) < (2, 12) || flags & 1 == 0 {
        return Err(BootError::Protocol { major, minor });
    }
    let truncated = || BootError::Truncated { what: "bzImage" };
    let [setup_sectors] = field(file, HEADER)?;
    let sectors = if setup_sectors == 0 { 4 } else { usize::from(setup_sectors) };
    let code = file.get((sectors + 1) * 512..).ok_or_else(truncated)?;
    // The jump over the header says where the header ends. BP "setup header"
    let [header_jump] = field(file, 0x201)?;
    let header = file.get(HEADER..0x202 + usize::from(header_jump)).ok_or_else(truncated)?;
    let (offset, bytes) = (u32_at(file, 0x248)? as usize, u32_at(file, 0x24c)? as usize);
    let payload = code.get(offset..).and_then(|c| c.get(..bytes)).ok_or_else(truncated)?;
    Ok(BzImage {
        header,
        code,
        payload,
        load_address: u64::from_le_bytes(field(file, 0x258)?),
        init_bytes: u32_at(file, 0x260)?.into(),
        initrd_max: u32_at(file, 0x22c)?.into(),
        cmdline_max: u32_at(file, 0x238)? as usize,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A bzImage of protocol 2.15 with one setup sector, `code` behind it and the payload at `payload_at` in the code.
    pub(in super::super) fn image(code: &[u8], payload_at: u32, payload_bytes: u32) -> Vec<u8> {
        let mut file = vec![0u8; 1024];
        file[0x1f1] = 1;
        file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        file[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x206..0x208].copy_from_slice(&[15, 2]);
        file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        file[0x236] = 0x7f;
        file[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
        file[0x248..0x24c].copy_from_slice(&payload_at.to_le_bytes());
        file[0x24c..0x250].copy_from_slice(&payload_bytes.to_le_bytes());
        file[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
        file[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
        file.extend(code);
        file
    }

    #[test]
    fn fields_and_payload_are_found() {
        let file = image(b"0123456789", 4, 3);
        let image = parse(&file).unwrap();
        assert_eq!((image.code, image.payload), (&b"0123456789"[..], &b"456"[..]));
        assert_eq!((image.load_address, image.init_bytes, image.cmdline_max), (16 << 20, 1 << 20, 2047));
        assert_eq!(image.header.len(), 0x26c - 0x1f1);
    }

    #[test]
    fn other_files_and_damaged_headers_are_refused() {
        assert!(matches!(parse(b"MZ"), Err(BootError::UnknownFormat)));
        let good = image(b"0123456789", 4, 3);
        let mut old = good.clone();
        old[0x206] = 11;
        assert!(matches!(parse(&old), Err(BootError::Protocol { major: 2, minor: 11 })));
        for (at, value) in [(0x1f1, 200), (0x248, 200), (0x24f, 1)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert!(matches!(parse(&bad), Err(BootError::Truncated { .. })), "{at:#x}");
        }
        for end in 0..good.len() {
            let _ = parse(&good[..end]);
        }
    }
}
