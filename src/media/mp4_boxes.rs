//! Walks through the boxes of MP4 and QuickTime files (ISO/IEC 14496-12).
//!
//! Called by `packet_feed.rs` and `claims.rs`, on the blocking pool. Must never read more than a
//! box's header, or a short box, at a time.

use std::{fs::File, os::unix::fs::FileExt};

/// H.264 parameter sets are a few hundred bytes; a box that claims more is not what it seems.
const MAX_CONFIGURATION_BYTES: u64 = 64 << 10;
/// Boxes looked at on one level: a file has some ten.
const MAX_BOXES: usize = 1000;

/// A part of a file; of a box, what is in it.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    pub start: u64,
    pub end: u64,
}

impl Span {
    /// The whole file.
    pub fn whole(file: &File) -> Option<Self> {
        Some(Span { start: 0, end: file.metadata().ok()?.len() })
    }

    /// The media boxes of the video tracks of a movie box.
    pub fn video_media(&self, file: &File) -> Option<Vec<Span>> {
        let is_video = |media: &Span| {
            let mut kind = [0; 4];
            let handler = media.only(file, b"hdlr");
            let read = handler.and_then(|handler| file.read_exact_at(&mut kind, handler.start + 8).ok());
            read.is_some() && &kind == b"vide"
        };
        let tracks = self.boxes(file)?.into_iter().filter(|(kind, _)| kind == b"trak");
        Some(tracks.filter_map(|(_, track)| track.only(file, b"mdia")).filter(is_video).collect())
    }

    /// The boxes side by side here (ISO/IEC 14496-12, 4.2), none if they do not fit or are too
    /// many.
    pub fn boxes(&self, file: &File) -> Option<Vec<([u8; 4], Span)>> {
        let (mut boxes, mut at) = (Vec::new(), self.start);
        // QuickTime ends some lists with four zero bytes.
        while self.end.saturating_sub(at) >= 8 {
            let mut head = [0; 8];
            file.read_exact_at(&mut head, at).ok()?;
            let [a, b, c, d, kind @ ..] = head;
            let (len, header) = match u32::from_be_bytes([a, b, c, d]) {
                0 => (self.end - at, 8),
                1 => {
                    let mut long = [0; 8];
                    file.read_exact_at(&mut long, at + 8).ok()?;
                    (u64::from_be_bytes(long), 16)
                }
                len => (len.into(), 8),
            };
            let end = at.checked_add(len)?;
            if len < header || end > self.end || boxes.len() == MAX_BOXES {
                return None;
            }
            boxes.push((kind, Span { start: at + header, end }));
            at = end;
        }
        Some(boxes)
    }

    /// The first box of a kind.
    pub fn only(&self, file: &File, kind: &[u8; 4]) -> Option<Span> {
        self.boxes(file)?.into_iter().find(|(found, _)| found == kind).map(|(_, span)| span)
    }

    /// The one box here.
    pub fn single(&self, file: &File) -> Option<([u8; 4], Span)> {
        match self.boxes(file)?.as_slice() {
            [one] => Some(*one),
            _ => None,
        }
    }

    /// This part without its first bytes.
    pub fn after(&self, bytes: u64) -> Option<Span> {
        let start = self.start.checked_add(bytes)?;
        (start <= self.end).then_some(Span { start, ..*self })
    }

    /// The bytes of a short part.
    pub fn read(&self, file: &File) -> Option<Vec<u8>> {
        let len = self.end - self.start;
        let mut bytes = vec![0; usize::try_from(len.min(MAX_CONFIGURATION_BYTES)).ok()?];
        file.read_exact_at(&mut bytes, self.start).ok()?;
        (len <= MAX_CONFIGURATION_BYTES).then_some(bytes)
    }
}
