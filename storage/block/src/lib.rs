//! The block engine: a guest disk over a chain of image files.
//!
//! A [`Disk`] is opened from file descriptors and opens nothing by path; [`resolve_chain`] does that for the
//! daemon and the command line, with locks that exclude QEMU. Requests carry the guest's own buffers down to
//! `preadv` and `pwritev`. Any number of threads use a disk at once; they block in system calls, unless a [`Ring`] takes what is plain data, and an image's
//! one lock is held only while its tables are looked at. The engine reaches files only through [`FileBackend`], which tests replace by one that records, fails or loses writes.
//!
//! Durability of qcow2: refcounts and data are on disk before the tables that refer to them, and a cluster
//! is reused only after the tables that referred to it are gone from the disk. A crash at any write leaks
//! space at worst. See `qcow2/commit.rs`. What concerns an image as a whole, like its snapshots and its size, changes in
//! one switch of its header: [`Qcow2Image`].
//!
//! Errors are one enum, [`BlockError`]; [`BlockError::kind`] is what a device or the daemon decides on.
//! `unsafe` lives in `sys` alone: guest memory as I/O vectors, the ring over it, and open file description locks.
#![deny(unsafe_code)]

pub mod blkdebug;
mod chain;
mod compare;
mod copy;
mod create;
mod crew;
mod disk;
mod error;
mod foreign;
mod host_file;
mod io;
pub mod job;
mod luks;
mod mapped;
pub mod nbd;
mod node;
mod page_buf;
mod qcow2;
mod random;
mod raw;
mod ring;
mod runs;
mod slice_cache;
pub mod spec;
#[allow(unsafe_code)]
mod sys;
mod throttle;
mod vdi;
mod vhdx;
mod vmdk;
mod vpc;
mod window;
mod zeroes;

pub use blkdebug::Event;
pub use chain::{
    CHAIN_MAX, ChainFile, Checked, DataFileInfo, ImageInfo, Qcow2Info, beside, check_foreign, check_image, inspect,
    inspect_backend, open_alone, rebuild_suffices, resolve_chain, resolve_chain_probing,
};
pub use compare::compare;
pub use copy::{CopyOptions, copy};
pub use create::{
    DataFile, Preallocation, Qcow2Create, create_qcow2, create_raw, format_data_file, format_qcow2, format_raw,
    open_for_new,
};
pub use crew::run_on_threads;
pub use disk::{CacheMode, ChainBackend, ChainExtent, Counters, DetectZeroes, Discard, Disk, OpenOptions};
pub use error::{Action, BlockError, ErrorKind};
pub use foreign::{ForeignImage, ForeignInfo, ForeignReport};
pub use host_file::{HostFile, use_direct_io};
pub use image::luks::{
    CipherAlgorithm, CipherMode, CipherSpec, Hash, Header as LuksHeader, IvGenerator, LuksError,
    STRIPES as LUKS_STRIPES, decrypt_aes256_cbc,
};
pub use image::ova;
pub use image::qcow2::Snapshot;
pub use image::qcow2::{CompressionType, CryptMethod};
pub use image::vdi::DISK_BYTES_MAX as VDI_BYTES_MAX;
pub use image::vmdk::layout::{AdapterType, NewExtent, Subformat};
pub use image::{Format, PROBE_BYTES, UnreadFormat, probe};
pub use io::{FileBackend, ReadBackend, ReadOnly};
pub use luks::{
    EncryptionInfo, KeySlotChange, KeySlotError, LayerKey, LuksCreate, Passphrase, change_key_slots, create_luks,
};
pub use node::{Extent, ExtentKind};
pub use page_buf::PageBuf;
pub use qcow2::{
    Amend, BitmapBits, BitmapInfo, MaintenanceError, Qcow2Image, Repair, Repaired, SnapshotTime, repair_backend,
    repair_image,
};
pub use ring::{Begun, Over, Ring};
pub use sys::{ReadBufs, WriteBufs};
pub use throttle::{Admission, Direction, LIMIT_MAX, Limit, Limits, Throttle, ThrottleError, ThrottleLimits};
pub use vdi::{VdiOptions, create_vdi};
pub use vhdx::{VhdxOptions, create_vhdx};
pub use vmdk::{
    VmdkExtentInfo, VmdkInfo, VmdkOptions, create_vmdk, create_vmdk_extent, vmdk_descriptor, vmdk_extent_names,
    vmdk_extents,
};
pub use vpc::{VpcOptions, create_vpc};
pub use window::Window;
