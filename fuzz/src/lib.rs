//! How the targets read their input: a program of one-byte operations with their arguments. Plain enough
//! to write seeds by hand (examples/seeds.rs), and an input means the same in every version of any crate.

/// The rest of the input.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// Everything is still to come.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next byte; None at the end.
    pub fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// The next byte; 0 past the end.
    pub fn small(&mut self) -> u8 {
        self.byte().unwrap_or(0)
    }

    /// The next two bytes, the low one first; 0 past the end.
    pub fn number(&mut self) -> u16 {
        u16::from_le_bytes([self.small(), self.small()])
    }

    /// A byte that says how many, then so many bytes; fewer at the end.
    pub fn piece(&mut self) -> &'a [u8] {
        let len = usize::from(self.small()).min(self.0.len());
        let (piece, rest) = self.0.split_at(len);
        self.0 = rest;
        piece
    }

    /// All that is left.
    pub fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// `bytes` in pieces of the sizes in `cuts`, again and again (0 counts as 256); no cuts, one piece.
pub fn cut<'a>(mut bytes: &'a [u8], cuts: &[u8]) -> Vec<&'a [u8]> {
    let mut pieces = Vec::new();
    let mut sizes = cuts.iter().map(|n| if *n == 0 { 256 } else { usize::from(*n) }).cycle();
    while !bytes.is_empty() {
        let size = sizes.next().unwrap_or(bytes.len()).min(bytes.len());
        let (piece, rest) = bytes.split_at(size);
        pieces.push(piece);
        bytes = rest;
    }
    pieces
}
