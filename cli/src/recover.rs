//! `weft pool export` and `weft pool recover`: the pool's records from its disks, when the store that kept them is
//! lost. Neither needs a daemon, and none may run: an export takes the disks' locks, a recovery the state directory's.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use control::etcd::{Etcd, EtcdSettings, EtcdTls};
use control::recover::notes::{NOTES, disk_note, vdi_note};
use control::recover::{Asked, Export, FoundDisk, FoundShard, MergeError, Recovery, decode_export, merge};
use control::{ControlStore, RecordError};
use edge::file::Access;
use edge::rocks::Rocks;
use replication::{DiskNode, ShardRecord};
use serde_json::json;
use store::{Store, StoreSettings};
use types::{DiskId, HeapBlock, Token, VdiId};

use crate::failure::{Failure, Outcome};
use crate::offline;
use crate::output::{self, Align, Table, size};

/// How long etcd may take for one answer.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  weft pool export /dev/sdb /dev/sdc > host1.json")]
pub struct ExportArgs {
    /// The disks of this host; no daemon may have them open
    #[arg(required = true, value_name = "DISK")]
    disks: Vec<PathBuf>,
    /// The daemon's state directory, where the disks' indexes are
    #[arg(long, value_name = "DIR", default_value = offline::STATE)]
    state: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  weft pool recover /dev/sdb /dev/sdc\n  \
    weft pool recover host1.json host2.json --etcd http://10.0.0.1:2379\n\n\
Stop blockd on every host first, and do not start it before the records are written.\n\
Without --yes it shows what it found and asks.")]
pub struct RecoverArgs {
    /// Disks of this host, and files that `weft pool export` wrote on others
    #[arg(required = true, value_name = "DISK|FILE")]
    sources: Vec<PathBuf>,
    /// The daemon's state directory
    #[arg(long, value_name = "DIR", default_value = offline::STATE)]
    state: PathBuf,
    /// This disk is lost for good; its replicas are made anew from the others
    #[arg(long, value_name = "DISK-ID")]
    without: Vec<DiskId>,
    /// Bring back this VDI although it was deleted
    #[arg(long, value_name = "VDI-ID")]
    undelete: Vec<u32>,
    /// Take shards as they are that may lack what was written to them
    #[arg(long)]
    accept_lost: bool,
    /// Overwrite the records that are there
    #[arg(long)]
    overwrite: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    etcd: EtcdArgs,
}

/// Where a cluster keeps its records; the same as in the daemons' [cluster] settings.
#[derive(Debug, Args)]
struct EtcdArgs {
    /// The records are in etcd, at these members
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    etcd: Vec<String>,
    /// What etcd's keys begin with
    #[arg(long, value_name = "TEXT", default_value = "/weft/", requires = "etcd")]
    etcd_prefix: String,
    /// etcd's user
    #[arg(long, value_name = "NAME", requires = "etcd_password_file")]
    etcd_user: Option<String>,
    /// A file with the user's password
    #[arg(long, value_name = "FILE", requires = "etcd_user")]
    etcd_password_file: Option<PathBuf>,
    /// The authority that signed the members' certificates, PEM
    #[arg(long, value_name = "FILE", requires = "etcd")]
    etcd_ca: Option<PathBuf>,
    /// Our certificate, PEM
    #[arg(long, value_name = "FILE", requires = "etcd_key")]
    etcd_cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    etcd_key: Option<PathBuf>,
}

/// `weft pool export`
pub fn export(args: &ExportArgs) -> Outcome<()> {
    let mut export = Export::default();
    for path in &args.disks {
        export.disks.push(read_disk(path, &args.state)?);
    }
    output::print(&String::from_utf8_lossy(&export.encode()));
    Ok(())
}

/// `weft pool recover`
pub fn recover(args: &RecoverArgs, json: bool) -> Outcome<()> {
    let etcd = args.etcd.settings()?;
    for path in &args.sources {
        // Before anything is made or asked: a slip of the pen.
        std::fs::metadata(path).map_err(|error| {
            Failure::failed(format!("{}: {error}", path.display()), "name the pool's disks")
        })?;
    }
    make_state(&args.state)?;
    let lock = lock(&args.state)?;
    let mut exports = Vec::new();
    for path in &args.sources {
        exports.push(source(path, &args.state)?);
    }
    let asked = Asked {
        without: args.without.iter().copied().collect(),
        undelete: args.undelete.iter().copied().map(VdiId).collect(),
        accept_lost: args.accept_lost,
    };
    let recovery = merge(&exports, &asked, jiff::Timestamp::now()).map_err(|error| unmergeable(&error))?;
    if json {
        output::json(&as_json(&recovery));
    } else {
        output::print(&describe(&recovery));
    }
    if let Some(first) = recovery.problems.first() {
        return Err(Failure::refused(
            format!(
                "{} problems are in the way; the first: {first}",
                recovery.problems.len()
            ),
            "nothing was changed",
        ));
    }
    let target = Target::open(&args.state, lock, etcd)?;
    target.may_be_overwritten(args.overwrite)?;
    output::confirm("these become the pool's records", args.yes)?;
    target.store.put_recovered(&recovery).map_err(failed)?;
    if !json {
        output::line("the records are written; start blockd on every host, and attach the VDIs again");
    }
    Ok(())
}

fn unmergeable(error: &MergeError) -> Failure {
    let hint = match error {
        MergeError::NoDisk => "give the disks of this host, or files of `weft pool export`",
        MergeError::OtherPool { .. } => "give the disks of one pool",
        MergeError::Twice { .. } => "give each disk once; a copy of it must not be there",
    };
    Failure::refused(error.to_string(), hint)
}

fn failed(error: RecordError) -> Failure {
    Failure::from(control::ApiError::from(error))
}

/// Where the records go.
struct Target {
    store: ControlStore,
    /// Held until the end: no daemon of this host can start meanwhile.
    _lock: File,
}

impl Target {
    fn open(state: &Path, lock: File, etcd: Option<EtcdSettings>) -> Outcome<Target> {
        let store = match etcd {
            None => {
                let records = Rocks::open_records(&state.join("control"));
                let records = records.map_err(|error| {
                    Failure::failed(error.to_string(), "see that the state directory can be written")
                })?;
                ControlStore::new(Box::new(records))
            }
            Some(settings) => {
                let etcd = Etcd::open_to_rebuild(settings);
                let etcd = etcd.map_err(|error| failed(RecordError::from(error)))?;
                ControlStore::over(Arc::new(etcd))
            }
        };
        Ok(Target { store, _lock: lock })
    }

    fn may_be_overwritten(&self, is_accepted: bool) -> Outcome<()> {
        let (pool, vdis) = self.store.overwritten().map_err(failed)?;
        if is_accepted || (pool.is_none() && vdis.is_empty()) {
            return Ok(());
        }
        let name = pool.map_or_else(
            || "of no pool".to_owned(),
            |pool| format!("of pool '{}'", pool.name),
        );
        Err(Failure::refused(
            format!("there are records {name} with {} VDIs already", vdis.len()),
            "nothing was changed; if they are old or wrong: --overwrite",
        ))
    }
}

impl EtcdArgs {
    fn settings(&self) -> Outcome<Option<EtcdSettings>> {
        if self.etcd.is_empty() {
            return Ok(None);
        }
        for url in &self.etcd {
            let place = url
                .strip_prefix("http://")
                .or_else(|| url.strip_prefix("https://"));
            let port = place.and_then(|place| place.rsplit_once(':'));
            if !port.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()) {
                let shown: String = url.chars().filter(|c| !c.is_control()).take(100).collect();
                return Err(Failure::refused(
                    format!("'{shown}' is no address of etcd"),
                    "write http://ADDRESS:PORT, or https://",
                ));
            }
        }
        let read = |path: &Path| {
            std::fs::read(path).map_err(|error| Failure::failed(format!("{}: {error}", path.display()), ""))
        };
        let password = self.etcd_password_file.as_deref().map(read).transpose()?;
        let password = password.map(|bytes| String::from_utf8_lossy(&bytes).trim_end().to_owned());
        let identity = match (&self.etcd_cert, &self.etcd_key) {
            (Some(certificate), Some(key)) => Some((read(certificate)?, read(key)?)),
            _ => None,
        };
        let authority = self.etcd_ca.as_deref().map(read).transpose()?;
        let is_tls = self.etcd.iter().any(|url| url.starts_with("https:"));
        Ok(Some(EtcdSettings {
            endpoints: self.etcd.clone(),
            prefix: self.etcd_prefix.clone(),
            user: self.etcd_user.clone().zip(password),
            tls: is_tls.then_some(EtcdTls {
                authority,
                identity,
                server_name: None,
            }),
            patience: PATIENCE,
        }))
    }
}

fn make_state(state: &Path) -> Outcome<()> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(state);
    let made = made.and_then(|()| std::fs::create_dir_all(state.join("index")));
    made.map_err(|error| Failure::failed(format!("{}: {error}", state.display()), "name another --state"))
}

fn lock(state: &Path) -> Outcome<File> {
    let path = state.join("lock");
    let shown = path.display();
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|error| Failure::failed(format!("{shown}: {error}"), "use sudo"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(Failure::refused(
            format!("a blockd runs on {}", state.display()),
            "stop it, here and on every host: `systemctl stop weft-blockd`",
        )),
        Err(std::fs::TryLockError::Error(error)) => Err(Failure::failed(format!("{shown}: {error}"), "")),
    }
}

/// An export begins with a brace, which no superblock does.
fn source(path: &Path, state: &Path) -> Outcome<Export> {
    let first = File::open(path).and_then(|mut file| {
        use std::io::Read;
        let mut first = [0];
        let count = file.read(&mut first)?;
        Ok((count == 1).then_some(first[0]))
    });
    match first {
        Ok(Some(b'{')) => {
            let shown = path.display().to_string();
            let bytes =
                std::fs::read(path).map_err(|error| Failure::failed(format!("{shown}: {error}"), ""))?;
            decode_export(&shown, &bytes)
                .map_err(|error| Failure::failed(error.to_string(), "write it again: `weft pool export`"))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(Failure::not_found(
            format!("{}: {error}", path.display()),
            "give disks, or files of `weft pool export`",
        )),
        _ => Ok(Export {
            disks: vec![read_disk(path, state)?],
        }),
    }
}

/// What is on a disk, read as the daemon does: its log is replayed into its index.
fn read_disk(path: &Path, state: &Path) -> Outcome<FoundDisk> {
    let mut file = offline::open(path, Access::ReadWrite)?;
    let superblock = offline::superblock(&file, path)?;
    let bytes = edge::BlockFile::bytes(&file);
    let folder = state.join("index").join(superblock.disk.to_string());
    if let Some(parent) = folder.parent() {
        std::fs::create_dir_all(parent)
            .map_err(|error| Failure::failed(format!("{}: {error}", parent.display()), "name the --state"))?;
    }
    // It is a cache of the log: one that does not open is made anew.
    let mut index = match Rocks::open_index(&folder) {
        Ok(index) => index,
        Err(_) => offline::empty_index(&folder)?,
    };
    let recovered = store::recover(&mut file, &mut index, offline::entropy()?);
    let (recovered, _) = recovered
        .map_err(|error| Failure::failed(format!("{}: {error}", path.display()), offline::REPLACE))?;
    let opens = recovered.superblock().open_count;
    let store: Store<HeapBlock> = Store::open(recovered, StoreSettings::default());
    let node = DiskNode::new(superblock.disk, store);
    let mut found = FoundDisk {
        disk: superblock.disk,
        pool: superblock.pool,
        path: std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()),
        bytes,
        opens,
        note: None,
        vdis: Vec::new(),
        shards: Vec::new(),
        promised: Token::default(),
        unreadable: Vec::new(),
    };
    for summary in node.shards() {
        let (promised, good_until) = node.promise(summary.shard).unwrap_or_default();
        if promised.epoch.0 == u64::MAX {
            // Let go by a daemon that stopped before the drop was done; or of a later version.
            if !summary.record.is_empty() || promised.incarnation.0 == u64::MAX {
                let words = format!("shard {} is kept in a way this weft does not know", summary.shard);
                found.unreadable.push(words);
            }
            continue;
        }
        found.promised = found.promised.max(promised);
        if summary.shard.vdi == NOTES {
            take_note(&mut found, summary.shard.no.0, &summary.record);
        } else if let Some(record) =
            ShardRecord::decode(&summary.record).filter(|record| record.shard == summary.shard)
        {
            found.shards.push(FoundShard {
                record,
                promised,
                end: summary.end,
                good_until,
                blocks: summary.data_blocks,
            });
        } else {
            found
                .unreadable
                .push(format!("the record of shard {} is damaged", summary.shard));
        }
    }
    Ok(found)
}

fn take_note(found: &mut FoundDisk, number: u32, bytes: &[u8]) {
    let taken = if number == 0 {
        disk_note(bytes).map(|note| found.note = Some(note))
    } else {
        vdi_note(VdiId(number), bytes).map(|note| found.vdis.push(note))
    };
    if let Err(error) = taken {
        found.unreadable.push(error.to_string());
    }
}

fn describe(recovery: &Recovery) -> String {
    let mut text = output::fields(&[
        ("pool", recovery.pool.name.clone()),
        ("id", recovery.pool.id.to_string()),
        ("rebuilt", format!("for the {}. time", recovery.pool.recovered)),
    ]);
    let mut disks = Table::new(&[
        ("DISK", Align::Left),
        ("PATH", Align::Left),
        ("SIZE", Align::Right),
        ("ZONE", Align::Left),
        ("HOST", Align::Left),
    ]);
    for disk in &recovery.disks {
        disks.row(vec![
            disk.id.to_string(),
            disk.path.display().to_string(),
            size(disk.bytes),
            if disk.zone.is_empty() {
                "-".to_owned()
            } else {
                disk.zone.clone()
            },
            disk.host.map_or_else(|| "-".to_owned(), |host| host.to_string()),
        ]);
    }
    let mut vdis = Table::new(&[
        ("VDI", Align::Left),
        ("ID", Align::Right),
        ("SIZE", Align::Right),
        ("REPLICAS", Align::Right),
        ("SHARDS", Align::Right),
        ("FOUND", Align::Right),
        ("BEHIND", Align::Right),
        ("UNSURE", Align::Right),
        ("", Align::Left),
    ]);
    for vdi in &recovery.vdis {
        vdis.row(vec![
            vdi.record.name.clone(),
            vdi.record.id.to_string(),
            size(vdi.record.bytes),
            vdi.record.replicas.to_string(),
            vdi.record.shard_count().to_string(),
            vdi.found.to_string(),
            vdi.behind.to_string(),
            vdi.unsure.to_string(),
            if vdi.is_deleted {
                "deleted before, left out".to_owned()
            } else {
                String::new()
            },
        ]);
    }
    text.push_str(&format!("\n{}\n{}", disks.render(0), vdis.render(0)));
    for remark in &recovery.remarks {
        text.push_str(&format!("note: {remark}\n"));
    }
    for problem in &recovery.problems {
        text.push_str(&format!("problem: {problem}\n"));
    }
    text
}

fn as_json(recovery: &Recovery) -> serde_json::Value {
    let missing: BTreeSet<String> = recovery.missing.iter().map(DiskId::to_string).collect();
    json!({
        "pool": recovery.pool,
        "disks": recovery.disks,
        "vdis": recovery.vdis.iter().map(|vdi| json!({
            "id": vdi.record.id,
            "name": vdi.record.name,
            "bytes": vdi.record.bytes,
            "replicas": vdi.record.replicas,
            "shards": vdi.record.shard_count(),
            "found": vdi.found,
            "behind": vdi.behind,
            "unsure": vdi.unsure,
            "deleted": vdi.is_deleted,
        })).collect::<Vec<_>>(),
        "missing_disks": missing,
        "incarnation": recovery.incarnation,
        "remarks": recovery.remarks,
        "problems": recovery.problems,
    })
}
