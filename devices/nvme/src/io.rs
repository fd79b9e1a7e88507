//! Commands of the NVM command set. NVME 6

use guest_ram::Memory;
use hv_core::{DiskFault, Transfer};

use crate::command::{Command, Outcome, Status};
use crate::identify::BLOCK_SHIFT;
use crate::prp;
use crate::work::Controller;

const FLUSH: u8 = 0x00;
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;
const WRITE_ZEROES: u8 = 0x08;
const DATASET_MANAGEMENT: u8 = 0x09;

const FORCE_UNIT_ACCESS: u32 = 1 << 30;
const DEALLOCATE: u32 = 1 << 25;
const ATTRIBUTE_DEALLOCATE: u32 = 1 << 2;
const RANGE_BYTES: u64 = 16;

/// How a request ended.
enum Failed {
    Status(Status),
    Later,
    Wait,
}
impl From<Status> for Failed {
    fn from(status: Status) -> Failed {
        Failed::Status(status)
    }
}
type Done = Result<(), Failed>;

/// A fault of the disk, as `status` where the guest is to see it.
fn fault(status: Status) -> impl Fn(DiskFault) -> Failed {
    move |fault| match fault {
        DiskFault::Hold => Failed::Later,
        DiskFault::Wait => Failed::Wait,
        DiskFault::Report => Failed::Status(status),
        DiskFault::Unsupported => Failed::Status(Status::INVALID_OPCODE),
    }
}

/// Carries out a command of an I/O queue.
pub(crate) fn execute(controller: &mut Controller, memory: &Memory, command: &Command) -> Outcome {
    let every = command.namespace == u32::MAX && command.opcode == FLUSH;
    if command.namespace != 1 && !every {
        return Status::INVALID_NAMESPACE.into();
    }
    let done = match command.opcode {
        FLUSH => flush(controller),
        WRITE => write(controller, memory, command),
        READ => read(controller, memory, command),
        WRITE_ZEROES => write_zeroes(controller, command),
        DATASET_MANAGEMENT => manage_dataset(controller, memory, command),
        _ => Err(Status::INVALID_OPCODE.into()),
    };
    match done {
        Ok(()) => Status::SUCCESS.into(),
        Err(Failed::Status(status)) => status.into(),
        Err(Failed::Later) => Outcome::Later,
        Err(Failed::Wait) => Outcome::Wait,
    }
}

/// Offset and length in bytes, if the blocks exist.
fn range(controller: &Controller, first: u64, blocks: u64) -> Result<(u64, u64), Failed> {
    let end = first.checked_add(blocks).filter(|&end| end <= controller.blocks());
    let end = end.ok_or(Status::OUT_OF_RANGE)?;
    Ok((first << BLOCK_SHIFT, (end - first) << BLOCK_SHIFT))
}

fn writable(controller: &Controller) -> Done {
    if controller.disk.read_only() { Err(Status::READ_ONLY.into()) } else { Ok(()) }
}

fn flush(controller: &mut Controller) -> Done {
    controller.disk.flush().map_err(fault(Status::WRITE_FAULT))
}

/// After a write: what was asked to be durable is, and everything where the driver has turned the cache off.
fn settle(controller: &mut Controller, command: &Command) -> Done {
    if command.dword12() & FORCE_UNIT_ACCESS != 0 || !controller.write_cache() { flush(controller) } else { Ok(()) }
}

fn write(controller: &mut Controller, memory: &Memory, command: &Command) -> Done {
    writable(controller)?;
    let (offset, bytes) = range(controller, command.first_block(), command.blocks())?;
    let buffers = prp::buffers(memory, command, bytes)?;
    controller.disk.admit(Transfer::Write, bytes).map_err(fault(Status::WRITE_FAULT))?;
    controller.disk.write(offset, &buffers).map_err(fault(Status::WRITE_FAULT))?;
    settle(controller, command)
}

fn read(controller: &mut Controller, memory: &Memory, command: &Command) -> Done {
    let (offset, bytes) = range(controller, command.first_block(), command.blocks())?;
    let buffers = prp::buffers(memory, command, bytes)?;
    controller.disk.admit(Transfer::Read, bytes).map_err(fault(Status::READ_ERROR))?;
    controller.disk.read(offset, &buffers).map_err(fault(Status::READ_ERROR))
}

fn write_zeroes(controller: &mut Controller, command: &Command) -> Done {
    writable(controller)?;
    let (offset, bytes) = range(controller, command.first_block(), command.blocks())?;
    let may_unmap = command.dword12() & DEALLOCATE != 0;
    controller.disk.admit(Transfer::Write, bytes).map_err(fault(Status::WRITE_FAULT))?;
    controller.disk.write_zeroes(offset, bytes, may_unmap).map_err(fault(Status::WRITE_FAULT))?;
    settle(controller, command)
}

/// Ranges the guest does not need; other advice than that is taken note of by nobody. NVME 6.7
fn manage_dataset(controller: &mut Controller, memory: &Memory, command: &Command) -> Done {
    let count = u64::from(command.dword10() & 0xff) + 1;
    let buffers = prp::buffers(memory, command, count * RANGE_BYTES)?;
    if command.dword11() & ATTRIBUTE_DEALLOCATE == 0 {
        return Ok(());
    }
    writable(controller)?;
    let mut list = Vec::with_capacity((count * RANGE_BYTES) as usize);
    for buffer in &buffers {
        let mut piece = vec![0; buffer.len()];
        buffer.copy_to(&mut piece);
        list.extend(piece);
    }
    let mut ranges = Vec::new();
    for entry in list.as_chunks::<16>().0 {
        let [_, _, _, _, n0, n1, n2, n3, first @ ..] = *entry;
        let blocks = u32::from_le_bytes([n0, n1, n2, n3]);
        ranges.push(range(controller, u64::from_le_bytes(first), blocks.into())?);
    }
    for (offset, bytes) in ranges {
        controller.disk.discard(offset, bytes).map_err(fault(Status::WRITE_FAULT))?;
    }
    Ok(())
}
