//! The two connections of the stream dialect, as the server reads them: `criu --stream` on the dump side
//! (streamer-capture.sock) and on the restore side (streamer-serve.sock). `D` stands for a descriptor,
//! which belongs to the last byte of the recvmsg(2) that returned it.

use super::{Key, WireError, criu, frame::FrameReader};

const NO_DESCRIPTOR: WireError = WireError::Descriptor("a byte without a pipe after a request");
const STRAY: WireError = WireError::Descriptor("a descriptor where none belongs");

/// The dump side: requests, each followed by one byte that carries the read end of a pipe.
#[derive(Debug)]
pub enum Capture {
    /// A request is to come.
    Request(FrameReader),
    /// The pipe of this image is to come.
    Pipe(Key),
}

impl Default for Capture {
    fn default() -> Self {
        Self::Request(FrameReader::default())
    }
}

impl Capture {
    /// Takes what one recvmsg(2) returned: at least one byte. Since a receive ends at a descriptor, it
    /// completes one image at most.
    pub fn feed<D>(
        &mut self,
        mut input: &[u8],
        mut descriptor: Option<D>,
    ) -> Result<Option<(Key, D)>, WireError> {
        if let Self::Request(reader) = self {
            match reader.feed(&mut input)? {
                Some(body) => *self = Self::Pipe(criu::decode_streamer_request(&body)?),
                None if descriptor.is_some() => return Err(STRAY),
                None => return Ok(None),
            }
        }
        match (input.len(), descriptor.take()) {
            (0, None) => Ok(None),
            (0, Some(_)) => Err(STRAY),
            (1, Some(pipe)) => match std::mem::take(self) {
                Self::Pipe(key) => Ok(Some((key, pipe))),
                Self::Request(_) => Err(STRAY),
            },
            _ => Err(NO_DESCRIPTOR),
        }
    }

    /// Whether the client is between two requests.
    pub fn is_idle(&self) -> bool {
        matches!(self, Self::Request(reader) if reader.is_empty())
    }
}

/// What came on the restore side.
#[derive(Debug, PartialEq, Eq)]
pub enum ServeEvent<D> {
    /// An image is asked for; the answer is given with [`Serve::answered`].
    Request(Key),
    /// The write end of the pipe that the image goes to.
    Pipe(D),
}

/// The restore side: a request, our answer, and, if the image exists, one byte that carries the write end
/// of a pipe.
#[derive(Debug)]
pub enum Serve {
    /// A request is to come.
    Request(FrameReader),
    /// We owe an answer; until then the client's tasks wait behind one another.
    Answer,
    /// The pipe is to come.
    Pipe,
}

impl Default for Serve {
    fn default() -> Self {
        Self::Request(FrameReader::default())
    }
}

impl Serve {
    /// Takes what one recvmsg(2) returned: at least one byte.
    pub fn feed<D>(
        &mut self,
        mut input: &[u8],
        descriptor: Option<D>,
    ) -> Result<Option<ServeEvent<D>>, WireError> {
        match self {
            Self::Request(reader) => {
                let body = reader.feed(&mut input)?;
                if descriptor.is_some() {
                    return Err(STRAY);
                }
                let Some(body) = body else { return Ok(None) };
                if !input.is_empty() {
                    return Err(WireError::Unexpected("behind its request"));
                }
                let key = criu::decode_streamer_request(&body)?;
                *self = Self::Answer;
                Ok(Some(ServeEvent::Request(key)))
            }
            Self::Answer => Err(WireError::Unexpected("before its request was answered")),
            Self::Pipe => match (input.len(), descriptor) {
                (1, Some(pipe)) => {
                    *self = Self::default();
                    Ok(Some(ServeEvent::Pipe(pipe)))
                }
                _ => Err(NO_DESCRIPTOR),
            },
        }
    }

    /// The answer has been given: a pipe follows if the image exists, else the next request.
    pub fn answered(&mut self, exists: bool) {
        *self = if exists { Self::Pipe } else { Self::default() };
    }

    /// Whether the client owes the rest of something it has begun.
    pub fn is_waiting(&self) -> bool {
        match self {
            Self::Request(reader) => !reader.is_empty(),
            Self::Answer => false,
            Self::Pipe => true,
        }
    }

    /// Whether the client is between two requests.
    pub fn is_idle(&self) -> bool {
        matches!(self, Self::Request(reader) if reader.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capture_in_pieces_and_glued() {
        let mut bytes = criu::encode_streamer_request(b"core-1.img");
        let mut capture = Capture::default();
        for byte in bytes.chunks(1) {
            assert_eq!(capture.feed::<u8>(byte, None), Ok(None));
        }
        assert!(!capture.is_idle());
        let got = capture.feed(b"\0", Some(3)).unwrap().unwrap();
        assert_eq!(got, (Key::stream(*b"core-1.img"), 3));
        assert!(capture.is_idle());

        bytes.push(0);
        assert!(capture.feed(&bytes, Some(4)).unwrap().is_some());
    }

    #[test]
    fn capture_without_its_pipe() {
        let mut bytes = criu::encode_streamer_request(b"a");
        assert_eq!(Capture::default().feed(&bytes, Some(1)), Err(STRAY));
        assert_eq!(Capture::default().feed(&bytes[..3], Some(1)), Err(STRAY));
        bytes.push(0);
        assert_eq!(Capture::default().feed::<u8>(&bytes, None), Err(NO_DESCRIPTOR));
        bytes.push(0);
        assert_eq!(Capture::default().feed(&bytes, Some(1)), Err(NO_DESCRIPTOR));
    }

    #[test]
    fn serve_takes_turns() {
        let request = criu::encode_streamer_request(b"a");
        let mut serve = Serve::default();
        let event = serve.feed::<u8>(&request, None).unwrap();
        assert_eq!(event, Some(ServeEvent::Request(Key::stream(*b"a"))));
        assert!(serve.feed::<u8>(&request, None).is_err(), "no second request before the answer");
        serve.answered(true);
        assert!(!serve.is_idle());
        assert_eq!(serve.feed(b"\0", Some(9)).unwrap(), Some(ServeEvent::Pipe(9)));
        assert!(serve.is_idle());
        serve.feed::<u8>(&request, None).unwrap();
        serve.answered(false);
        assert!(serve.is_idle());
        assert!(serve.feed(&request, Some(1)).is_err());
    }
}
