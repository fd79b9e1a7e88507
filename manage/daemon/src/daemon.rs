//! What all connections and owners share, and how it comes up: definitions from disk, running domains found again,
//! autostart.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::{OnceCell, mpsc};
use uuid::Uuid;
use xml::{DomainDefinition, VirtType};

use crate::clients::Clients;
use crate::console_hold::ConsoleHold;
use crate::console_places::ConsolePlaces;
use crate::domain::{Definition, Domain, Live, Snapshot, Status};
use crate::engine::{self, KvmReport};
use crate::error::DaemonError;
use crate::events::Events;
use crate::monitor_link::MonitorLink;
use crate::options::{Mode, Options};
use crate::owner::{self, Command, Running};
use crate::paths::Paths;
use crate::process::Process;
use crate::registry::Registry;
use crate::state_file::{RunFile, RunFiles};
use crate::store::{DefinitionStore, Disk};

/// The daemon.
#[derive(Debug)]
pub struct Daemon {
    /// Whose it is.
    pub mode: Mode,
    /// Its files are below a root of their own: either URI is right.
    pub rooted: bool,
    /// Where everything is.
    pub paths: Paths,
    /// The vireo-vmm program.
    pub vmm: PathBuf,
    /// All domains.
    pub registry: Arc<Registry>,
    /// Who wants to hear of what.
    pub events: Events,
    /// Who has which console.
    pub consoles: ConsolePlaces,
    /// Who is connected.
    pub clients: Clients,
    store: Arc<DefinitionStore<Disk>>,
    kvm: OnceCell<KvmReport>,
}

impl Daemon {
    /// Makes the directories, reads the definitions.
    pub fn new(options: &Options, paths: Paths, client_limit: usize) -> Result<Daemon, DaemonError> {
        let directories = [&paths.definitions, &paths.autostart, &paths.state, &paths.logs];
        for directory in directories {
            make_directory(directory, 0o700)?;
        }
        for socket in paths.sockets.iter().chain(&paths.read_only_sockets) {
            let mode = if options.mode == Mode::System { 0o755 } else { 0o700 };
            make_directory(socket.parent().unwrap_or(Path::new("/")), mode)?;
        }
        let store = DefinitionStore::new(paths.definitions.clone(), paths.autostart.clone(), Disk);
        let daemon = Daemon {
            mode: options.mode,
            rooted: options.root.is_some(),
            vmm: engine::find_vmm(options.vmm.as_deref()),
            registry: Arc::new(Registry::default()),
            events: Events::default(),
            consoles: ConsolePlaces::default(),
            clients: Clients::new(client_limit),
            store: Arc::new(store),
            kvm: OnceCell::new(),
            paths,
        };
        daemon.load_definitions()?;
        Ok(daemon)
    }

    fn load_definitions(&self) -> Result<(), DaemonError> {
        let report = |path: &Path, error: &std::io::Error| eprintln!("{}: {error}; not loaded", path.display());
        let wrong = |source| DaemonError::File { action: "read", path: self.paths.definitions.clone(), source };
        for stored in self.store.load_all(report).map_err(wrong)? {
            let path = self.store.path(&stored.name);
            let definition = match DomainDefinition::load(&stored.text) {
                Ok(definition) if definition.config().name == stored.name => definition,
                Ok(definition) => {
                    eprintln!("{}: defines '{}', not loaded", path.display(), definition.config().name);
                    continue;
                }
                Err(error) => {
                    eprintln!("{}: {error}; not loaded", path.display());
                    continue;
                }
            };
            let uuid = definition.config().uuid;
            if let Some(other) = self.registry.by_uuid(uuid) {
                // A rename that a power cut stopped half way leaves both names; one of them is enough, with the mark that
                // either has.
                let mut snapshot = (*other.snapshot()).clone();
                if stored.autostart && !snapshot.autostart {
                    self.store.set_autostart(&snapshot.name, true).map_err(wrong)?;
                    snapshot.autostart = true;
                    other.publish(snapshot.clone());
                }
                eprintln!("{}: has the uuid of '{}', removed", path.display(), snapshot.name);
                self.store.delete(&stored.name).map_err(wrong)?;
                continue;
            }
            self.registry.insert(Arc::new(Domain::new(
                uuid,
                Snapshot {
                    name: stored.name.as_str().into(),
                    status: Status::OFF,
                    config: Some(Arc::new(Definition::new(&definition))),
                    live: None,
                    autostart: stored.autostart,
                    failed_disks: Vec::new(),
                },
            )));
        }
        Ok(())
    }

    /// Finds the domains again that a former daemon left running.
    pub async fn adopt_running(self: &Arc<Self>) -> Result<(), DaemonError> {
        let wrong = |source| DaemonError::File { action: "read", path: self.paths.state.clone(), source };
        let run_files = RunFiles::read_all(&self.paths.state).map_err(wrong)?;
        self.end_orphans(&run_files).await;
        for run_file in run_files {
            self.registry.reserve_ids(run_file.id);
            let files = RunFiles::new(&self.paths.state, &run_file.name, run_file.uuid);
            let name = run_file.name.clone();
            let (uuid, process) = (run_file.uuid, Process::find(run_file.process));
            let adopted = match process {
                Some(process) => self.adopt(run_file, &files, process).await,
                None => {
                    let words = crate::launch::last_words(&self.log_path(&name), run_file.log_start);
                    Err(DaemonError::VmmEnded { when: "while no daemon watched", last_words: words })
                }
            };
            if let Err(error) = adopted {
                eprintln!("domain '{name}': not found again: {error}");
                files.remove();
                if let Some(domain) = self.registry.by_uuid(uuid) {
                    let mut snapshot = (*domain.snapshot()).clone();
                    snapshot.status = Status::OFF_CRASHED;
                    domain.publish(snapshot);
                }
            }
        }
        Ok(())
    }

    /// Ends machines that a former daemon had built and not yet written down when it was killed: nobody was told that they
    /// run, and a second start would share their disks.
    async fn end_orphans(&self, known: &[RunFile]) {
        let known: Vec<PathBuf> =
            known.iter().map(|run| RunFiles::new(&self.paths.state, &run.name, run.uuid).monitor()).collect();
        for entry in fs::read_dir(&self.paths.state).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "mon") && !known.contains(&path) {
                MonitorLink::quit_stranger(&path).await;
                // Found again at the next start where it cannot be removed now.
                let _ = fs::remove_file(&path);
            }
        }
    }

    /// Takes hold of a process again. One that cannot be talked to is ended: nobody could manage its guest, and a second
    /// start would share its disks.
    async fn adopt(self: &Arc<Self>, run_file: RunFile, files: &RunFiles, process: Process) -> Result<(), DaemonError> {
        let talk = self.talk_again(&run_file, files, &process).await;
        let (live, status, events) = talk.inspect_err(|_| process.kill())?;
        let domain = match self.registry.by_uuid(run_file.uuid) {
            Some(domain) => domain,
            None => {
                let snapshot = Snapshot { status, ..Snapshot::unborn(&run_file.name) };
                let domain = Arc::new(Domain::new(run_file.uuid, snapshot));
                self.registry.insert(domain.clone());
                domain
            }
        };
        let mut snapshot = (*domain.snapshot()).clone();
        snapshot.live = Some(Arc::new(live));
        snapshot.status = status;
        domain.publish(snapshot);
        owner::adopt(
            self,
            &domain,
            Running { process, events, files: files.clone(), run_file, ending: None, reboot: false },
        );
        Ok(())
    }

    async fn talk_again(
        &self,
        run_file: &RunFile,
        files: &RunFiles,
        process: &Process,
    ) -> Result<(Live, Status, mpsc::UnboundedReceiver<monitor::Event>), DaemonError> {
        let name = run_file.name.clone();
        let definition = DomainDefinition::load(run_file.live_xml.as_bytes())?;
        let (monitor, events) = MonitorLink::connect(&files.monitor(), &name, &run_file.uuid.to_string()).await?;
        let status = match monitor.ask(&name, monitor::Command::QueryStatus).await? {
            monitor::Reply::Status(status) => owner::adopted_status(status),
            _ => return Err(DaemonError::Monitor { name, detail: "no status in the answer to query-status".into() }),
        };
        let (definition, pid) = (Definition::new(&definition), process.id().pid);
        let live = Live { id: run_file.id, definition, pid, monitor, consoles: ConsoleHold::new(Vec::new()) };
        Ok((live, status, events))
    }

    /// Starts the domains marked for it: in system mode once per boot of the host, in a session at every start.
    pub async fn autostart(self: &Arc<Self>) {
        if self.mode == Mode::System {
            // The run directory is emptied by a reboot, and only by that.
            let marker = self.paths.state.join("autostarted");
            if marker.exists() {
                return;
            }
            if let Err(error) = fs::write(&marker, b"") {
                eprintln!("{}: {error}; no domain is started by itself", marker.display());
                return;
            }
        }
        for domain in self.registry.all() {
            let snapshot = domain.snapshot();
            if snapshot.autostart && snapshot.live.is_none() {
                let start = Command::Start { paused: false, definition: None };
                if let Err(error) = owner::ask(self, &domain, start).await {
                    eprintln!("domain '{}': autostart failed: {error}", snapshot.name);
                }
            }
        }
    }

    /// Destroys runs whose client has gone away, unless they have ended and others have begun.
    pub async fn end_runs(self: &Arc<Self>, runs: Vec<(Uuid, i32)>) {
        for (uuid, id) in runs {
            if let Some(domain) = self.registry.by_uuid(uuid).filter(|domain| domain.snapshot().id() == id) {
                // One that ends by itself at this moment has ended as well.
                let _ = owner::ask(self, &domain, Command::Destroy { graceful: false }).await;
            }
        }
    }

    /// What the document of a run would be as a definition.
    pub fn definition_of_run(&self, live: &Live) -> Result<DomainDefinition, DaemonError> {
        let emulator = self.vmm.to_string_lossy();
        let mut context = xml::DefineContext { emulator: &emulator, random: &mut Daemon::random };
        Ok(DomainDefinition::define(live.definition.xml.as_bytes(), &mut context)?)
    }

    /// Runs something that blocks on a thread for such things.
    pub async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, DaemonError> + Send + 'static,
    ) -> Result<T, DaemonError> {
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(join) => std::panic::resume_unwind(join.into_panic()),
        }
    }

    async fn store(
        &self,
        action: &'static str,
        name: &str,
        work: impl FnOnce(&DefinitionStore<Disk>) -> std::io::Result<()> + Send + 'static,
    ) -> Result<(), DaemonError> {
        let store = self.store.clone();
        let path = store.path(name);
        self.blocking(move || work(&store).map_err(|source| DaemonError::File { action, path, source })).await
    }

    /// Stores a definition durably.
    pub async fn save_definition(&self, definition: &Arc<Definition>) -> Result<(), DaemonError> {
        let definition = definition.clone();
        let name = definition.config.name.clone();
        self.store("save", &name.clone(), move |store| store.save(&name, &definition.xml)).await
    }

    /// Forgets a stored definition.
    pub async fn delete_definition(&self, name: &str) -> Result<(), DaemonError> {
        let owned = name.to_owned();
        self.store("delete", name, move |store| store.delete(&owned)).await
    }

    /// Moves a stored definition to its new name.
    pub async fn rename_definition(
        &self,
        old: &str,
        new: &Arc<Definition>,
        autostart: bool,
    ) -> Result<(), DaemonError> {
        let (from, new) = (old.to_owned(), new.clone());
        self.store("rename", old, move |store| store.rename(&from, &new.config.name, &new.xml, autostart)).await
    }

    /// Stores whether a domain starts by itself.
    pub async fn set_autostart(&self, name: &str, autostart: bool) -> Result<(), DaemonError> {
        let owned = name.to_owned();
        self.store("set autostart of", name, move |store| store.set_autostart(&owned, autostart)).await
    }

    /// Where the vireo-vmm of a domain prints.
    pub fn log_path(&self, name: &str) -> PathBuf {
        self.paths.logs.join(format!("{name}.log"))
    }

    /// Whether KVM works here; asked once.
    pub async fn kvm(&self) -> &KvmReport {
        self.kvm.get_or_init(|| engine::probe_kvm(self.vmm.clone())).await
    }

    /// Refuses an engine that does not work here.
    pub async fn check_engine(&self, virt_type: VirtType) -> Result<(), DaemonError> {
        if virt_type == VirtType::Kvm {
            let report = self.kvm().await;
            if !report.usable {
                return Err(DaemonError::KvmUnusable { reason: report.reason.clone().unwrap_or_default() });
            }
        }
        Ok(())
    }

    /// A running domain keeps an otherwise idle daemon up.
    pub fn has_running(&self) -> bool {
        self.registry.all().iter().any(|domain| domain.snapshot().live.is_some())
    }

    /// 16 random bytes for a uuid or an address.
    pub fn random() -> [u8; 16] {
        *Uuid::new_v4().as_bytes()
    }
}

fn make_directory(path: &Path, mode: u32) -> Result<(), DaemonError> {
    let made = fs::DirBuilder::new().recursive(true).mode(mode).create(path);
    made.map_err(|source| DaemonError::File { action: "make directory", path: path.into(), source })
}
