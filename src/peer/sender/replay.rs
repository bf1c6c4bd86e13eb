//! The replay buffer: what has been taken from a pipe of CRIU and has not been acknowledged. Should the link be lost,
//! that is sent again; CRIU does not write it twice. Pure.

use std::collections::VecDeque;

/// The bytes of one transfer that are kept.
#[derive(Debug, Default)]
pub struct Replay {
    // Each with its place in the transfer, one behind the other.
    chunks: VecDeque<(u64, Vec<u8>)>,
    // How many bytes have been taken from the pipe, those that are gone from here included.
    to: u64,
}

impl Replay {
    /// More has been taken from the pipe.
    pub fn push(&mut self, chunk: Vec<u8>) {
        let at = self.to;
        self.to += chunk.len() as u64;
        if !chunk.is_empty() {
            self.chunks.push_back((at, chunk));
        }
    }

    /// Where what is kept begins.
    pub fn from(&self) -> u64 {
        self.chunks.front().map_or(self.to, |(at, _)| *at)
    }

    /// Where it ends.
    pub fn to(&self) -> u64 {
        self.to
    }

    /// How many bytes are kept.
    pub fn len(&self) -> u64 {
        self.to - self.from()
    }

    /// Some of what follows the first `at` bytes of the transfer; nothing: that is gone, or has not come yet.
    pub fn piece(&self, at: u64) -> &[u8] {
        let behind = self.chunks.partition_point(|(start, _)| *start <= at);
        let chunk = behind.checked_sub(1).and_then(|index| self.chunks.get(index));
        chunk.and_then(|(start, chunk)| chunk.get((at - start) as usize..)).unwrap_or_default()
    }

    /// The first `to` bytes of the transfer are stored: how many bytes less are kept for that. A piece goes as a
    /// whole.
    pub fn acknowledged(&mut self, to: u64) -> u64 {
        let before = self.len();
        while self.chunks.front().is_some_and(|(at, chunk)| at + chunk.len() as u64 <= to) {
            self.chunks.pop_front();
        }
        before - self.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(replay: &Replay, from: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() as u64 + from < replay.to() {
            let piece = replay.piece(from + bytes.len() as u64);
            assert!(!piece.is_empty());
            bytes.extend(piece);
        }
        bytes
    }

    #[test]
    fn what_is_not_acknowledged_can_be_had_from_anywhere() {
        let mut replay = Replay::default();
        assert_eq!((replay.len(), replay.from(), replay.piece(0)), (0, 0, &[][..]));
        for chunk in [&b"012"[..], b"", b"3456", b"7"] {
            replay.push(chunk.to_vec());
        }
        for from in 0..=8 {
            assert_eq!(all(&replay, from), b"01234567"[from as usize..]);
        }
        assert_eq!(replay.piece(8), b"");
        assert_eq!(replay.piece(1000), b"");
    }

    #[test]
    fn what_is_acknowledged_goes_piece_by_piece() {
        let mut replay = Replay::default();
        replay.push(b"012".to_vec());
        replay.push(b"3456".to_vec());
        assert_eq!((replay.acknowledged(2), replay.from()), (0, 0));
        assert_eq!((replay.acknowledged(5), replay.from(), replay.len()), (3, 3, 4));
        assert_eq!(replay.piece(2), b"");
        assert_eq!(all(&replay, 5), b"56");
        assert_eq!(replay.acknowledged(5), 0, "once");
        assert_eq!((replay.acknowledged(u64::MAX), replay.from(), replay.to()), (4, 7, 7));
        replay.push(b"78".to_vec());
        assert_eq!((replay.piece(7), replay.len()), (&b"78"[..], 2));
    }
}
