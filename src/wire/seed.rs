//! The seed peer protocol (2017): remote_image_entry, payload, again and again; the close is the end.

use super::{
    Key, WireError,
    criu::{self, Transfer, WriteMode},
    frame::FrameReader,
};

/// One thing found in the stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Item<'a> {
    /// An image, or more of one, begins.
    Begin(Transfer),
    /// Bytes of it, in order.
    Data(&'a [u8]),
    /// It is complete.
    End,
}

/// Takes the stream apart, wherever it is cut.
#[derive(Debug)]
pub struct Decoder {
    state: State,
}

#[derive(Debug)]
enum State {
    Header(FrameReader),
    /// This many bytes of payload are to come; 0: the end is to be told.
    Payload(u64),
}

impl Default for Decoder {
    fn default() -> Self {
        Self { state: State::Header(FrameReader::default()) }
    }
}

impl Decoder {
    /// The next item in `input`, which is left at what follows it; None when more input is needed. `held`
    /// says how many bytes of an image are here already: an append announces the image's size after it,
    /// so the payload is what is missing (protocols: size counts from the image's first byte). Size 0
    /// is an empty image, and nothing new where an image of that name exists.
    pub fn next<'a>(
        &mut self,
        input: &mut &'a [u8],
        held: impl FnOnce(&Key) -> u64,
    ) -> Result<Option<Item<'a>>, WireError> {
        match &mut self.state {
            State::Header(reader) => {
                let Some(body) = reader.feed(input)? else { return Ok(None) };
                let transfer = criu::decode_transfer(&body)?;
                let payload = match transfer.mode {
                    WriteMode::Append if transfer.size > 0 => {
                        let held = held(&transfer.key);
                        transfer.size.checked_sub(held).ok_or_else(|| WireError::Shrinks {
                            key: transfer.key.clone(),
                            size: transfer.size,
                            held,
                        })?
                    }
                    _ => transfer.size,
                };
                self.state = State::Payload(payload);
                Ok(Some(Item::Begin(transfer)))
            }
            State::Payload(0) => {
                *self = Self::default();
                Ok(Some(Item::End))
            }
            State::Payload(_) if input.is_empty() => Ok(None),
            State::Payload(missing) => {
                let here = usize::try_from(*missing).map_or(input.len(), |m| m.min(input.len()));
                let (data, rest) = input.split_at(here);
                *input = rest;
                *missing -= here as u64;
                Ok(Some(Item::Data(data)))
            }
        }
    }

    /// Whether the stream may end here.
    pub fn at_boundary(&self) -> bool {
        matches!(&self.state, State::Header(reader) if reader.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// What a receiver holds after `bytes`, fed in pieces of `piece` bytes.
    fn receive(bytes: &[u8], piece: usize) -> Result<HashMap<Key, Vec<u8>>, WireError> {
        let mut images: HashMap<Key, Vec<u8>> = HashMap::new();
        let mut current = None;
        let mut decoder = Decoder::default();
        for mut input in bytes.chunks(piece) {
            let held = |key: &Key, images: &HashMap<Key, Vec<u8>>| images.get(key).map_or(0, |i| i.len());
            while let Some(item) = decoder.next(&mut input, |key| held(key, &images) as u64)? {
                match item {
                    Item::Begin(transfer) => {
                        if transfer.mode == WriteMode::Truncate {
                            images.remove(&transfer.key);
                        }
                        images.entry(transfer.key.clone()).or_default();
                        current = Some(transfer.key);
                    }
                    Item::Data(data) => {
                        let key = current.as_ref().unwrap();
                        images.get_mut(key).unwrap().extend(data);
                    }
                    Item::End => current = None,
                }
            }
        }
        assert!(decoder.at_boundary() && current.is_none());
        Ok(images)
    }

    fn transfer(name: &[u8], mode: WriteMode, size: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = criu::encode_transfer(&Transfer { key: Key::new(*b"d", name), mode, size });
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn appends_overwrites_and_empty_images() {
        let mut bytes = transfer(b"a", WriteMode::Append, 3, b"one");
        bytes.extend(transfer(b"b", WriteMode::Append, 4, b"long"));
        bytes.extend(transfer(b"a", WriteMode::Append, 6, b"two"));
        bytes.extend(transfer(b"b", WriteMode::Truncate, 1, b"s"));
        bytes.extend(transfer(b"empty", WriteMode::Append, 0, b""));
        bytes.extend(transfer(b"a", WriteMode::Append, 0, b""));
        for piece in [1, 2, 7, 4096] {
            let images = receive(&bytes, piece).unwrap();
            assert_eq!(images[&Key::new(*b"d", *b"a")], b"onetwo");
            assert_eq!(images[&Key::new(*b"d", *b"b")], b"s");
            assert_eq!(images[&Key::new(*b"d", *b"empty")], b"");
        }
    }

    #[test]
    fn an_append_never_shrinks() {
        let mut bytes = transfer(b"a", WriteMode::Append, 3, b"one");
        bytes.extend(transfer(b"a", WriteMode::Append, 2, b""));
        assert!(matches!(receive(&bytes, 64), Err(WireError::Shrinks { size: 2, held: 3, .. })));
    }

    #[test]
    fn sizes_are_64_bit() {
        let mut decoder = Decoder::default();
        let bytes = transfer(b"a", WriteMode::Append, u64::MAX, b"xyz");
        let mut input = &bytes[..];
        assert!(matches!(decoder.next(&mut input, |_| 0), Ok(Some(Item::Begin(_)))));
        assert_eq!(decoder.next(&mut input, |_| 0), Ok(Some(Item::Data(b"xyz"))));
        assert!(!decoder.at_boundary());
    }
}
