//! An object of CRIU's protocols: a 32-bit length in the host's byte order, then that many bytes.

use prost::Message;

use super::WireError;

/// The longest header taken, in bytes. CRIU sets no limit; a header names a path and a snapshot id, each
/// shorter than PATH_MAX (4096), and a few numbers.
pub const MAX_BODY: usize = 2 * 4096 + 64;

/// How many bytes the length takes.
pub const LENGTH: usize = 4;

/// Collects one object after the other from bytes that come in pieces of any size.
#[derive(Debug, Default)]
pub struct FrameReader {
    // Length and body as far as they have come; a Vec so that an idle connection costs nothing.
    got: Vec<u8>,
}

impl FrameReader {
    /// Takes what belongs to the object from the front of `input`, which is left at what follows, and
    /// returns the object's body once it is whole.
    pub fn feed(&mut self, input: &mut &[u8]) -> Result<Option<Vec<u8>>, WireError> {
        if !fill(&mut self.got, LENGTH, input) {
            return Ok(None);
        }
        let mut length = [0; LENGTH];
        length.copy_from_slice(&self.got[..LENGTH]);
        let length = u32::from_ne_bytes(length);
        let body = length as usize;
        if body == 0 || body > MAX_BODY {
            return Err(WireError::Length(length));
        }
        if !fill(&mut self.got, LENGTH + body, input) {
            return Ok(None);
        }
        let mut got = std::mem::take(&mut self.got);
        got.drain(..LENGTH);
        Ok(Some(got))
    }

    /// Whether nothing of an object has come yet.
    pub fn is_empty(&self) -> bool {
        self.got.is_empty()
    }
}

/// Fills `got` up to `target` bytes from the front of `input`; says whether it is filled.
pub(super) fn fill(got: &mut Vec<u8>, target: usize, input: &mut &[u8]) -> bool {
    let missing = target.saturating_sub(got.len()).min(input.len());
    let (head, rest) = input.split_at(missing);
    got.extend_from_slice(head);
    *input = rest;
    got.len() >= target
}

/// One object, ready to be sent with a single send(2), as CRIU's reading needs it.
pub fn encode(message: &impl Message) -> Vec<u8> {
    let body = message.encoded_len();
    let mut out = Vec::with_capacity(LENGTH + body);
    out.extend_from_slice(&(body as u32).to_ne_bytes());
    message.encode_raw(&mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(body: &[u8]) -> Vec<u8> {
        let mut out = (body.len() as u32).to_ne_bytes().to_vec();
        out.extend_from_slice(body);
        out
    }

    #[test]
    fn byte_by_byte_and_glued() {
        let mut bytes = object(b"one");
        bytes.extend(object(b"two"));
        bytes.push(9);
        let mut reader = FrameReader::default();
        let mut seen = Vec::new();
        for piece in bytes.chunks(1) {
            let mut input = piece;
            while !input.is_empty() {
                seen.extend(reader.feed(&mut input).unwrap());
            }
        }
        assert_eq!(seen, [b"one".to_vec(), b"two".to_vec()]);
        assert!(!reader.is_empty());

        let mut input = &bytes[..];
        let mut reader = FrameReader::default();
        assert_eq!(reader.feed(&mut input).unwrap().unwrap(), b"one");
        assert_eq!(input.len(), bytes.len() - 7, "nothing past the object is taken");
    }

    #[test]
    fn limits() {
        let longest = object(&vec![1; MAX_BODY]);
        assert!(FrameReader::default().feed(&mut &longest[..]).unwrap().is_some());
        let over = object(&vec![1; MAX_BODY + 1]);
        assert_eq!(FrameReader::default().feed(&mut &over[..]), Err(WireError::Length(MAX_BODY as u32 + 1)));
        assert_eq!(FrameReader::default().feed(&mut &[0; 4][..]), Err(WireError::Length(0)));
        assert_eq!(FrameReader::default().feed(&mut &[0xff; 4][..]), Err(WireError::Length(u32::MAX)));
    }
}
