//! Commands of the admin queue. NVME 5

use guest_ram::Memory;

use crate::command::{COMMAND_BYTES, COMPLETION_BYTES, Command, Outcome, Status};
use crate::identify::{self, EVENT_REQUESTS, IDENTIFY_BYTES};
use crate::interrupt::{IO_QUEUES, QUEUES};
use crate::prp;
use crate::queue::{CompletionQueue, SubmissionQueue, is_ring};
use crate::registers::MAX_ENTRIES;
use crate::work::Controller;

const DELETE_SUBMISSION: u8 = 0x00;
const CREATE_SUBMISSION: u8 = 0x01;
const GET_LOG_PAGE: u8 = 0x02;
const DELETE_COMPLETION: u8 = 0x04;
const CREATE_COMPLETION: u8 = 0x05;
const IDENTIFY: u8 = 0x06;
const ABORT: u8 = 0x08;
const SET_FEATURES: u8 = 0x09;
const GET_FEATURES: u8 = 0x0a;
const EVENT_REQUEST: u8 = 0x0c;

const PHYSICALLY_CONTIGUOUS: u32 = 1;
const INTERRUPTS_ENABLED: u32 = 2;

/// Features that are kept as they are set: number, value after reset. The cache (6) and the number of queues (7) act.
const FEATURES: [(u8, u32); 9] = [
    (0x01, 0),
    (0x02, 0),
    (0x04, 353),
    (0x05, 0),
    (WRITE_CACHE, 1),
    (0x08, 0),
    (0x09, 0),
    (0x0a, 0),
    (EVENT_CONFIGURATION, 0),
];
/// Which asynchronous events are wanted.
pub(crate) const EVENT_CONFIGURATION: u8 = 0x0b;
/// Log page of changed namespaces.
pub(crate) const CHANGED_NAMESPACES: u32 = 4;
/// Volatile write cache.
pub(crate) const WRITE_CACHE: u8 = 0x06;
const NUMBER_OF_QUEUES: u8 = 0x07;

/// Values of all features after reset.
pub(crate) fn default_features() -> Vec<(u8, u32)> {
    FEATURES.to_vec()
}

/// Carries out a command of the admin queue.
pub(crate) fn execute(controller: &mut Controller, memory: &Memory, command: &Command) -> Outcome {
    let result = match command.opcode {
        DELETE_SUBMISSION => delete_submission(controller, command),
        CREATE_SUBMISSION => create_submission(controller, memory, command),
        DELETE_COMPLETION => delete_completion(controller, command),
        CREATE_COMPLETION => create_completion(controller, memory, command),
        GET_LOG_PAGE => log_page(controller, memory, command),
        IDENTIFY => identify(controller, memory, command),
        // Commands are carried out in order and at once: there is never one to abort. NVME 5.1
        ABORT => Ok(1),
        SET_FEATURES => set_features(controller, command),
        GET_FEATURES => get_features(controller, command),
        EVENT_REQUEST => return event_request(controller, command),
        _ => Err(Status::INVALID_OPCODE),
    };
    match result {
        Ok(dword0) => Outcome::Done(Status::SUCCESS, dword0),
        Err(status) => status.into(),
    }
}

/// Number and size of a queue to be created.
fn new_queue(command: &Command) -> Result<(u16, u32), Status> {
    let (id, entries) = (command.dword10() as u16, (command.dword10() >> 16) + 1);
    if id == 0 || id >= QUEUES {
        return Err(Status::QUEUE_ID);
    }
    if !(2..=MAX_ENTRIES).contains(&entries) {
        return Err(Status::QUEUE_SIZE);
    }
    if command.dword11() & PHYSICALLY_CONTIGUOUS == 0 {
        return Err(Status::INVALID_FIELD); // as CAP.CQR says
    }
    Ok((id, entries))
}

fn create_completion(controller: &mut Controller, memory: &Memory, command: &Command) -> Result<u32, Status> {
    let (id, size) = new_queue(command)?;
    if controller.completion(id).is_some() {
        return Err(Status::QUEUE_ID);
    }
    if !is_ring(memory, command.prp1, size, COMPLETION_BYTES) {
        return Err(Status::PRP_OFFSET);
    }
    let vector = (command.dword11() >> 16) as u16;
    let enabled = command.dword11() & INTERRUPTS_ENABLED != 0;
    if enabled && vector >= QUEUES {
        return Err(Status::INTERRUPT_VECTOR);
    }
    let vector = enabled.then_some(vector);
    controller.add_completion(id, CompletionQueue { base: command.prp1, size, tail: 0, phase: true, vector });
    Ok(0)
}

fn create_submission(controller: &mut Controller, memory: &Memory, command: &Command) -> Result<u32, Status> {
    let (id, size) = new_queue(command)?;
    let completion = (command.dword11() >> 16) as u16;
    if completion == 0 || controller.completion(completion).is_none() {
        return Err(Status::COMPLETION_QUEUE);
    }
    if controller.submission(id).is_some() {
        return Err(Status::QUEUE_ID);
    }
    if !is_ring(memory, command.prp1, size, COMMAND_BYTES) {
        return Err(Status::PRP_OFFSET);
    }
    controller.add_submission(id, SubmissionQueue { base: command.prp1, size, head: 0, completion });
    Ok(0)
}

fn delete_submission(controller: &mut Controller, command: &Command) -> Result<u32, Status> {
    let id = command.dword10() as u16;
    if id == 0 || !controller.remove_submission(id) { Err(Status::QUEUE_ID) } else { Ok(0) }
}

fn delete_completion(controller: &mut Controller, command: &Command) -> Result<u32, Status> {
    let id = command.dword10() as u16;
    if id == 0 || controller.completion(id).is_none() {
        return Err(Status::QUEUE_ID);
    }
    if controller.completion_in_use(id) {
        return Err(Status::QUEUE_DELETION);
    }
    controller.remove_completion(id);
    Ok(0)
}

/// Copies `data` to where the command points, at most `bytes` of it.
fn answer(memory: &Memory, command: &Command, data: &[u8], bytes: usize) -> Result<u32, Status> {
    let data = data.get(..bytes.min(data.len())).unwrap_or(&[]);
    let mut done = 0;
    for buffer in prp::buffers(memory, command, data.len() as u64)? {
        let rest = data.get(done..).unwrap_or(&[]);
        let piece = rest.get(..rest.len().min(buffer.len())).unwrap_or(&[]);
        buffer.copy_from(piece);
        done += piece.len();
    }
    Ok(0)
}

/// NVME 5.15
fn identify(controller: &Controller, memory: &Memory, command: &Command) -> Result<u32, Status> {
    let page = match command.dword10() & 0xff {
        0 if command.namespace == 1 => identify::namespace(controller.blocks(), controller.disk.read_only()),
        0 => return Err(Status::INVALID_NAMESPACE),
        1 => identify::controller(controller.serial(), controller.disk.write_cache()),
        2 if command.namespace < 0xffff_fffe => identify::namespace_list(command.namespace),
        // The namespace has no identifier of its own: an empty list.
        3 if command.namespace == 1 => vec![0; IDENTIFY_BYTES],
        2 | 3 => return Err(Status::INVALID_NAMESPACE),
        _ => return Err(Status::INVALID_FIELD),
    };
    answer(memory, command, &page, IDENTIFY_BYTES)
}

/// NVME 5.14
fn log_page(controller: &mut Controller, memory: &Memory, command: &Command) -> Result<u32, Status> {
    let page = match command.dword10() & 0xff {
        1 => identify::errors(),
        2 => identify::health(),
        3 => identify::firmware(),
        CHANGED_NAMESPACES => identify::changed_namespaces(controller.take_changed(command)),
        _ => return Err(Status::LOG_PAGE),
    };
    let dwords = u64::from(command.dword10() >> 16) | u64::from(command.dword11() & 0xffff) << 16;
    let bytes = usize::try_from((dwords + 1) * 4).unwrap_or(usize::MAX);
    let offset = u64::from(command.dword12()) | u64::from(command.dword13()) << 32;
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    match page.get(offset..) {
        Some(rest) if offset.is_multiple_of(4) => answer(memory, command, rest, bytes),
        _ => Err(Status::INVALID_FIELD),
    }
}

/// NVME 5.21
fn set_features(controller: &mut Controller, command: &Command) -> Result<u32, Status> {
    let (feature, value) = (command.dword10() as u8, command.dword11());
    if feature == NUMBER_OF_QUEUES {
        // 0xffff queues cannot be asked for; the number is fixed once a queue exists. NVME 5.21.1.7
        if value & 0xffff == 0xffff || value >> 16 == 0xffff {
            return Err(Status::INVALID_FIELD);
        }
        if controller.has_io_queues() {
            return Err(Status::SEQUENCE);
        }
        return Ok(granted_queues());
    }
    if feature == 0x02 && value & 0x1f != 0 {
        return Err(Status::INVALID_FIELD); // there is one power state
    }
    if controller.set_feature(feature, value) { Ok(0) } else { Err(Status::INVALID_FIELD) }
}

/// NVME 5.13
fn get_features(controller: &Controller, command: &Command) -> Result<u32, Status> {
    let (feature, select) = (command.dword10() as u8, command.dword10() >> 8 & 7);
    if feature == NUMBER_OF_QUEUES {
        return Ok(granted_queues());
    }
    let default = FEATURES.iter().find(|(number, _)| *number == feature).map(|(_, value)| *value);
    let default = default.ok_or(Status::INVALID_FIELD)?;
    match select {
        0 => Ok(controller.feature(feature).unwrap_or(default)),
        1 | 2 => Ok(default),
        3 => Ok(1 << 2), // changeable, not saveable, for the whole controller
        _ => Err(Status::INVALID_FIELD),
    }
}

/// Submission and completion queues, each one less than there are.
fn granted_queues() -> u32 {
    let last = u32::from(IO_QUEUES) - 1;
    last << 16 | last
}

fn event_request(controller: &mut Controller, command: &Command) -> Outcome {
    if controller.event_requests() >= EVENT_REQUESTS {
        return Status::TOO_MANY_EVENT_REQUESTS.into();
    }
    controller.add_event_request(command.id);
    Outcome::Outstanding
}
