//! A link that was lost goes on: each transfer from where the cache has it.

use std::collections::HashMap;

use super::{Sender, Source, Transfer, TransferId};
use crate::store::{Bodies, BodyId};
use crate::wire::Key;
use crate::wire::relay::Holding;

impl Sender {
    /// The link is lost. What was given to it stays here as far as it can be sent again; nothing is sent until
    /// [`Sender::resumed`].
    pub fn link_lost(&mut self) {
        self.torn = true;
        self.frames.clear();
        self.out.clear();
        self.out_at = 0;
        self.moving = None;
    }

    /// Whether the link was lost and what the cache has is not known yet.
    pub fn is_torn(&self) -> bool {
        self.torn
    }

    /// Whether everything of this session can be sent again from its beginning: nothing of it has been stored.
    pub fn is_whole(&self) -> bool {
        let begins = |transfer: &Transfer| match &transfer.source {
            Source::Body(_) => true,
            Source::Pipe(..) => false,
            Source::Kept(_, replay) => replay.from() == 0,
        };
        self.stored_images == 0
            && self.transfers.values().all(begins)
            && self.unconfirmed.values().all(|(_, transfer)| begins(transfer))
    }

    /// The link goes on, and this is what the cache holds. What it does not have is sent again. Returns the images
    /// that it has and whose confirmation was lost, with their bodies. An error is the second half of a sentence;
    /// nothing has changed then.
    pub fn resumed(
        &mut self,
        holdings: &[Holding],
        bodies: &mut Bodies,
    ) -> Result<Vec<(Key, BodyId)>, String> {
        // Transfers count from 1: what has no number is no transfer.
        let held: HashMap<u64, &Holding> =
            holdings.iter().filter(|holding| holding.id > 0).map(|holding| (holding.id, holding)).collect();
        if let Some(id) = held.keys().find(|id| **id > self.last_opened) {
            return Err(format!("holds transfer {id}, which was not sent"));
        }
        for (number, id) in &self.open {
            if let Some(transfer) = self.transfers.get(id) {
                check(transfer, held.get(number).copied(), false)?;
            }
        }
        for (number, (_, transfer)) in &self.unconfirmed {
            check(transfer, held.get(number).copied(), true)?;
        }
        let mut stored = Vec::new();
        for (number, (id, transfer)) in std::mem::take(&mut self.unconfirmed) {
            if held.get(&number).is_some_and(|holding| holding.complete) {
                stored.extend(self.confirmed(transfer, bodies));
            } else {
                self.sent_images -= 1;
                self.transfers.insert(id, transfer);
                self.open.insert(number, id);
            }
        }
        for (number, id) in std::mem::take(&mut self.open) {
            self.rewind(number, id, held.get(&number).copied());
        }
        self.line_up();
        self.torn = false;
        Ok(stored)
    }

    // To where the cache has it, or to its beginning.
    fn rewind(&mut self, number: u64, id: TransferId, held: Option<&Holding>) {
        let Some(transfer) = self.transfers.get_mut(&id) else { return };
        let size = held.map_or(0, |holding| holding.size);
        self.sent_bytes -= transfer.at - transfer.from - size;
        transfer.at = transfer.from + size;
        // One that the cache has not heard of gets another number: they count up.
        transfer.opened = held.map(|_| number);
        if held.is_some() {
            self.open.insert(number, id);
        }
        if let Source::Kept(_, replay) = &mut transfer.source {
            let freed = replay.acknowledged(size);
            self.make_room(freed);
        }
    }

    // Each in its line again, in the order in which they began.
    fn line_up(&mut self) {
        self.ready.clear();
        self.crowded.clear();
        self.lines.clear();
        let mut ids: Vec<_> = self.transfers.keys().copied().collect();
        ids.sort_unstable();
        for id in ids {
            if let Some(transfer) = self.transfers.get_mut(&id) {
                transfer.queued = false;
                self.lines.entry(transfer.key.clone()).or_default().push_back(id);
            }
            self.grown(id);
        }
    }
}

// Whether a transfer can go on from what the cache says that it holds.
fn check(transfer: &Transfer, held: Option<&Holding>, closed: bool) -> Result<(), String> {
    let key = &transfer.key;
    let sent = transfer.at - transfer.from;
    let (size, complete) = held.map_or((0, false), |holding| (holding.size, holding.complete));
    if size > sent || (complete && (!closed || size != sent)) {
        let all = if complete { "all " } else { "" };
        return Err(format!("holds {all}{size} bytes of {key}, of which {sent} were sent"));
    }
    match &transfer.source {
        Source::Kept(_, replay) if size < replay.from() => Err(format!(
            "holds {size} bytes of {key}, and has acknowledged {}, which are not kept here any more",
            replay.from()
        )),
        // Its bytes are nowhere else.
        Source::Pipe(..) if size < sent => {
            Err(format!("holds {size} bytes of {key}, of which {sent} were sent"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::Protocol;
    use crate::wire::criu::WriteMode;
    use crate::wire::relay::{Ack, Decoder, Item, Kind};
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::rc::Rc;

    use crate::peer::sender::Passing;

    // What a link carries: the messages, and the raw bytes of each transfer.
    fn carried(
        sender: &mut Sender,
        bodies: &mut Bodies,
    ) -> (Vec<Kind>, std::collections::BTreeMap<u64, Vec<u8>>) {
        let (near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        sender.step(Protocol::Relay, false, bodies, near.as_fd()).unwrap();
        drop(near);
        let mut bytes = Vec::new();
        far.read_to_end(&mut bytes).unwrap();
        let (mut kinds, mut raw) = (Vec::new(), std::collections::BTreeMap::<u64, Vec<u8>>::new());
        let (mut decoder, mut input) = (Decoder::default(), &bytes[..]);
        while let Some(item) = decoder.next(&mut input).unwrap() {
            match item {
                Item::Message(Kind::Data(_)) => {}
                Item::Message(kind) => kinds.push(kind),
                Item::Bytes(id, data) => raw.entry(id).or_default().extend(data),
            }
        }
        (kinds, raw)
    }

    fn pipe(sender: &mut Sender, name: &str) -> std::io::PipeWriter {
        let (reader, writer) = std::io::pipe().unwrap();
        let key = Key::stream(name.as_bytes());
        sender.open_pipe(key, WriteMode::Append, Rc::new(reader.into()), Passing::Copy);
        writer
    }

    fn holding(id: u64, size: u64, complete: bool) -> Holding {
        Holding { id, size, complete, last: false }
    }

    #[test]
    fn transfers_go_on_where_the_cache_has_them() {
        let mut bodies = Bodies::new(10);
        let mut sender = Sender::with_replay_buffer(1 << 20);
        let mut open = pipe(&mut sender, "open");
        open.write_all(b"0123456789").unwrap();
        let mut closed = pipe(&mut sender, "closed");
        closed.write_all(b"abcdef").unwrap();
        drop(closed);
        pipe(&mut sender, "unheard").write_all(b"xyz").unwrap();
        let body = bodies.create();
        bodies.append(body, b"in memory").unwrap();
        let kept = sender.open(Key::stream(*b"kept"), WriteMode::Append, body, 3);
        sender.complete(kept, 9, &mut bodies);
        let (_, raw) = carried(&mut sender, &mut bodies);
        assert_eq!(raw[&1], b"0123456789");
        assert_eq!(sender.sent(), (3, 10 + 6 + 3 + 6));
        sender.acknowledged(&Ack { id: 1, bytes: 4 });
        sender.link_lost();
        assert!(!sender.is_idle() && sender.is_whole());
        open.write_all(b"AB").unwrap();
        assert_eq!(carried(&mut sender, &mut bodies).0, [], "nothing is sent, and nothing taken");
        let holdings = [holding(1, 7, false), holding(2, 6, true), holding(4, 2, false)];
        assert_eq!(sender.resumed(&holdings, &mut bodies), Ok(vec![]));
        let (kinds, raw) = carried(&mut sender, &mut bodies);
        assert_eq!(raw[&1], b"789AB", "{kinds:?}");
        // The cache has not heard of the third: it begins anew, behind the others.
        assert_eq!(raw[&5], b"xyz");
        assert_eq!(raw[&4], b"memory"[2..]);
        assert_eq!(raw.len(), 3);
        assert_eq!(sender.sent(), (3, 12 + 6 + 3 + 6));
        assert_eq!(sender.stored(), 1);
        assert_eq!(sender.ended().len(), 2, "the end of each pipe is told once");
        assert!(!sender.is_whole());
        sender.clear(&mut bodies);
        assert_eq!(bodies.count(), 0);
    }

    #[test]
    fn what_can_not_be_is_refused_and_changes_nothing() {
        let mut bodies = Bodies::new(10);
        let mut sender = Sender::with_replay_buffer(1 << 20);
        let mut open = pipe(&mut sender, "open");
        open.write_all(b"0123456789").unwrap();
        carried(&mut sender, &mut bodies);
        open.write_all(b"more").unwrap();
        sender.grown(1);
        carried(&mut sender, &mut bodies);
        sender.acknowledged(&Ack { id: 1, bytes: 10 });
        sender.link_lost();
        for wrong in [holding(1, 15, false), holding(1, 14, true), holding(1, 9, false), holding(2, 0, false)]
        {
            assert!(sender.resumed(std::slice::from_ref(&wrong), &mut bodies).is_err(), "{wrong:?}");
            assert!(sender.is_torn() && sender.sent() == (0, 14));
        }
        assert!(sender.resumed(&[], &mut bodies).is_err() && !sender.is_whole(), "its beginning is gone");
        sender.resumed(&[holding(1, 12, false)], &mut bodies).unwrap();
        drop(open);
        assert_eq!(carried(&mut sender, &mut bodies).1[&1], b"re");
    }

    #[test]
    fn a_full_buffer_takes_nothing_more() {
        let mut bodies = Bodies::new(10);
        let mut sender = Sender::with_replay_buffer(8);
        let mut one = pipe(&mut sender, "one");
        let mut other = pipe(&mut sender, "other");
        one.write_all(b"012345").unwrap();
        other.write_all(b"abcdef").unwrap();
        let (_, raw) = carried(&mut sender, &mut bodies);
        assert_eq!((&raw[&1][..], &raw[&2][..]), (&b"012345"[..], &b"ab"[..]));
        sender.acknowledged(&Ack { id: 1, bytes: 5 });
        assert_eq!(carried(&mut sender, &mut bodies).1.len(), 0, "a piece goes as a whole");
        sender.acknowledged(&Ack { id: 1, bytes: 6 });
        assert_eq!(carried(&mut sender, &mut bodies).1[&2], b"cdef");
        drop((one, other));
        sender.acknowledged(&Ack { id: 2, bytes: 1000 });
        sender.grown(1);
        sender.grown(2);
        let (kinds, _) = carried(&mut sender, &mut bodies);
        assert!(matches!(kinds[..], [Kind::Close(_), Kind::Close(_)]), "{kinds:?}");
    }
}
