//! The boxes of MP4 and MOV files: finds tracks and their display matrices.
//!
//! Called by `packet_feed.rs` and `probe.rs` on the blocking pool. Must never read more of a file
//! than the headers it needs, and never trust a length: a box that does not fit gives `None`.

use std::{fs::File, os::unix::fs::FileExt};

/// Boxes looked at on one level: a file has some ten.
const MAX_BOXES: usize = 1000;
/// Longest box content that is read. The largest, H.264 parameter sets, has a few hundred bytes.
const MAX_READ_BYTES: u64 = 64 << 10;

/// A display matrix `[a b u; c d v; x y w]`, row by row; a, b, c and d are 16.16 fixed-point.
pub type Matrix = [i64; 9];

/// A track of a movie.
#[derive(Debug, Clone, Copy)]
pub struct TrackBox {
    pub id: u32,
    pub span: Span,
    matrix: Matrix,
}

/// Returns the tracks of a file; `None` if its header cannot be read.
pub fn tracks(file: &File) -> Option<Vec<TrackBox>> {
    let tracks = movie(file)?.boxes(file)?.into_iter().filter(|(kind, _)| kind == b"trak");
    Some(tracks.filter_map(|(_, span)| TrackBox::read(file, span)).collect())
}

/// Returns the display matrix of track `id`: the track's, then the movie's.
pub fn display_matrix(file: &File, id: u32) -> Option<Matrix> {
    let track = tracks(file)?.into_iter().find(|track| track.id == id)?;
    let header = movie(file)?.only(file, b"mvhd")?.read(file)?;
    // Times, time scale and duration; then rate, volume and ten reserved bytes.
    let times = if *header.first()? == 1 { 28 } else { 16 };
    Some(product(&track.matrix, &matrix_at(&header, 4 + times + 16)?))
}

/// Returns the number of samples in the index of track `id` (ISO/IEC 14496-12, 8.7.3).
pub fn sample_count(file: &File, id: u32) -> Option<usize> {
    let track = tracks(file)?.into_iter().find(|track| track.id == id)?;
    let table = track.span.only(file, b"mdia")?.only(file, b"minf")?.only(file, b"stbl")?;
    let sizes = table.only(file, b"stsz").or_else(|| table.only(file, b"stz2"))?;
    // Version and flags, then the size of all samples or of a field.
    let mut count = [0; 4];
    file.read_exact_at(&mut count, sizes.start + 8).ok()?;
    // The index of a fragmented file is empty: its samples are in the fragments.
    usize::try_from(u32::from_be_bytes(count)).ok().filter(|&count| count > 0)
}

fn movie(file: &File) -> Option<Span> {
    Span::whole(file)?.only(file, b"moov")
}

impl TrackBox {
    /// Reads the track's header (ISO/IEC 14496-12, 8.3.2).
    fn read(file: &File, span: Span) -> Option<Self> {
        let header = span.only(file, b"tkhd")?.read(file)?;
        // Two times, the id, four reserved bytes, the duration: times and duration have 4 or 8
        // bytes.
        let time = if *header.first()? == 1 { 8 } else { 4 };
        let id = u32::from_be_bytes(header.get(4 + 2 * time..8 + 2 * time)?.try_into().ok()?);
        Some(TrackBox { id, span, matrix: matrix_at(&header, 4 + 3 * time + 8 + 16)? })
    }
}

fn matrix_at(header: &[u8], at: usize) -> Option<Matrix> {
    let mut matrix = Matrix::default();
    for (value, bytes) in matrix.iter_mut().zip(header.get(at..at + 36)?.chunks_exact(4)) {
        *value = i64::from(i32::from_be_bytes(bytes.try_into().ok()?));
    }
    Some(matrix)
}

/// Multiplies the parts a, b, c and d of two matrices.
fn product(first: &Matrix, second: &Matrix) -> Matrix {
    let mut product = Matrix::default();
    for row in 0..2 {
        for column in 0..2 {
            let sum: i64 = (0..2).map(|k| first[row * 3 + k] * second[k * 3 + column]).sum();
            product[row * 3 + column] = sum >> 16;
        }
    }
    product
}

/// The head of a box (ISO/IEC 14496-12, 4.2).
#[derive(Debug, Clone, Copy)]
pub struct BoxHead {
    pub kind: [u8; 4],
    /// Bytes of the whole box, as it says: unchecked.
    pub len: u64,
    /// Bytes of the head.
    pub header: u64,
}

impl BoxHead {
    /// Reads the head at `at`; a box without a length reaches to `end`.
    pub fn read(file: &File, at: u64, end: u64) -> Option<Self> {
        let mut head = [0; 8];
        file.read_exact_at(&mut head, at).ok()?;
        let [a, b, c, d, kind @ ..] = head;
        let (len, header) = match u32::from_be_bytes([a, b, c, d]) {
            0 => (end - at, 8),
            1 => {
                let mut long = [0; 8];
                file.read_exact_at(&mut long, at + 8).ok()?;
                (u64::from_be_bytes(long), 16)
            }
            len => (len.into(), 8),
        };
        Some(BoxHead { kind, len, header })
    }
}

/// A part of a file; of a box, what is in it.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    pub start: u64,
    pub end: u64,
}

impl Span {
    /// Returns the whole file.
    pub fn whole(file: &File) -> Option<Self> {
        Some(Span { start: 0, end: file.metadata().ok()?.len() })
    }

    /// Returns the media boxes of the video tracks of a movie box.
    pub fn video_media(&self, file: &File) -> Option<Vec<Span>> {
        let mut videos = Vec::new();
        for (kind, track) in self.boxes(file)? {
            let Some(media) = track.only(file, b"mdia").filter(|_| &kind == b"trak") else { continue };
            let Some(handler) = media.only(file, b"hdlr") else { continue };
            let mut handles = [0; 4];
            if file.read_exact_at(&mut handles, handler.start + 8).is_ok() && &handles == b"vide" {
                videos.push(media);
            }
        }
        Some(videos)
    }

    /// Returns the boxes of this level (ISO/IEC 14496-12, 4.2); `None` if they do not fit or are
    /// too many.
    pub fn boxes(&self, file: &File) -> Option<Vec<([u8; 4], Span)>> {
        let (mut boxes, mut at) = (Vec::new(), self.start);
        // QuickTime ends some lists with four zero bytes.
        while self.end.saturating_sub(at) >= 8 {
            let BoxHead { kind, len, header } = BoxHead::read(file, at, self.end)?;
            let end = at.checked_add(len)?;
            let fits = len >= header && end <= self.end;
            // A file may be cut off within its last box, or have other bytes after it.
            if !fits && self.start == 0 {
                boxes.push((kind, Span { start: at + header, end: self.end }));
                break;
            }
            if !fits || boxes.len() == MAX_BOXES {
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

    /// Without the first `bytes`.
    pub fn after(&self, bytes: u64) -> Option<Span> {
        let start = self.start.checked_add(bytes)?;
        (start <= self.end).then_some(Span { start, ..*self })
    }

    /// All of it, if it is at most [`MAX_READ_BYTES`] long.
    pub fn read(&self, file: &File) -> Option<Vec<u8>> {
        let len = self.end - self.start;
        let mut bytes = vec![0; usize::try_from(len.min(MAX_READ_BYTES)).ok()?];
        file.read_exact_at(&mut bytes, self.start).ok()?;
        (len <= MAX_READ_BYTES).then_some(bytes)
    }
}

#[cfg(test)]
pub mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    pub fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    pub fn mp4_box(kind: &[u8; 4], content: &[u8]) -> Vec<u8> {
        [&(content.len() as u32 + 8).to_be_bytes()[..], kind, content].concat()
    }

    fn matrix_bytes(matrix: &Matrix) -> Vec<u8> {
        matrix.iter().flat_map(|&value| (value as i32).to_be_bytes()).collect()
    }

    /// Content of a `tkhd` box of version 0.
    pub fn track_header(id: u8, matrix: &Matrix) -> Vec<u8> {
        [&[0; 15][..], &[id], &[0; 24], &matrix_bytes(matrix), &[0; 8]].concat()
    }

    const ONE: i64 = 1 << 16;
    const UPRIGHT: Matrix = [ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30];
    const CLOCKWISE: Matrix = [0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30];

    fn movie(version: u8, movie: &Matrix, tracks: &[Vec<u8>]) -> Vec<u8> {
        let times = if version == 1 { 28 } else { 16 };
        let header = [&[version, 0, 0, 0][..], &vec![0; times + 16], &matrix_bytes(movie), &[0; 28]].concat();
        let tracks: Vec<u8> =
            tracks.iter().flat_map(|header| mp4_box(b"trak", &mp4_box(b"tkhd", header))).collect();
        mp4_box(b"moov", &[mp4_box(b"mvhd", &header), tracks].concat())
    }

    #[test]
    fn turns_of_the_track_and_of_the_movie_add_up() {
        let turned = |version, whole: &Matrix, track: &Matrix| {
            let headers = [track_header(1, &UPRIGHT), track_header(7, track)];
            let matrix = display_matrix(&file(&movie(version, whole, &headers)), 7).unwrap();
            [matrix[0], matrix[1], matrix[3], matrix[4]].map(|value| value / ONE)
        };
        assert_eq!(turned(0, &UPRIGHT, &CLOCKWISE), [0, 1, -1, 0]);
        assert_eq!(turned(1, &CLOCKWISE, &UPRIGHT), [0, 1, -1, 0]);
        assert_eq!(turned(0, &CLOCKWISE, &CLOCKWISE), [-1, 0, 0, -1]);
        let long_times = [&[1; 1][..], &[0; 22], &[9], &[0; 28], &matrix_bytes(&CLOCKWISE), &[0; 8]].concat();
        let matrix = display_matrix(&file(&movie(0, &UPRIGHT, &[long_times])), 9).unwrap();
        assert_eq!(matrix[..2], [0, ONE]);
        assert!(display_matrix(&file(&movie(0, &UPRIGHT, &[])), 7).is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for header in [mp4_box(b"moov", &bytes), movie(0, &UPRIGHT, std::slice::from_ref(&bytes)), bytes] {
                display_matrix(&file(&header), 0);
            }
        }
    }
}
