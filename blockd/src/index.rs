//! The thread that owns a disk's index: RocksDB calls block, and the data plane must not.

use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use edge::KvStore;
use store::{IndexRequest, IndexResponse};
use types::DiskId;

use crate::plane::{Command, PlaneHandle};

/// The sending end. Dropping it lets the thread finish what it was given and waits for that: only then is RocksDB
/// closed, its directory free to be opened again, and the process free to exit.
pub struct IndexThread {
    sender: Option<Sender<IndexRequest>>,
    thread: Option<JoinHandle<()>>,
}

impl IndexThread {
    /// Starts the thread; answers go to the mailbox of `plane`.
    pub fn start(
        disk: DiskId,
        mut index: Box<dyn KvStore>,
        plane: PlaneHandle,
    ) -> std::io::Result<IndexThread> {
        let (sender, requests) = mpsc::channel();
        let name = format!("index-{:.8}", disk.to_string());
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || serve(disk, index.as_mut(), &requests, &plane))?;
        Ok(IndexThread {
            sender: Some(sender),
            thread: Some(thread),
        })
    }

    /// Hands a request to the thread.
    pub fn send(&self, request: IndexRequest) {
        let sender = self.sender.as_ref().expect("present until dropped");
        sender
            .send(request)
            .expect("the index thread runs as long as its disk");
    }
}

impl Drop for IndexThread {
    fn drop(&mut self) {
        self.sender.take();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("an index thread ended badly");
        }
    }
}

fn serve(disk: DiskId, index: &mut dyn KvStore, requests: &Receiver<IndexRequest>, plane: &PlaneHandle) {
    while let Ok(request) = requests.recv() {
        let response = match request {
            IndexRequest::Load { key, encoded } => IndexResponse::Loaded {
                key,
                value: index.get(&encoded),
            },
            IndexRequest::Checkpoint { id, batch } => IndexResponse::Checkpointed {
                id,
                result: index.apply(&batch),
            },
        };
        plane.send(Command::Index { disk, response });
    }
}
