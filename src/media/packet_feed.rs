//! Feeds a decoder only those packets of a file that the sampled frames need.
//!
//! Called by `decode.rs` for H.264 in MP4 and MOV, where packets can be told apart without decoding them: pictures that
//! no other picture refers to (`nal_ref_idc` 0, most B-frames) are left out unless they are sampled themselves, and so is
//! everything between the last frame wanted of a group of pictures and the next group that has one. What is left is given to
//! one process as a Matroska stream, whose times are the ranks of the frames that come out.
//!
//! Must never feed what begins with anything but an IDR picture: a decoder starts anew only there, so that nothing of
//! what was left out can show. Whatever is not as expected gives no feed. As with every plan, `decode.rs` checks the frames.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use tokio::{io::AsyncWriteExt, process::ChildStdin, sync::mpsc, task::spawn_blocking};

use super::{
    MediaError,
    ffmpeg::pipe_failed,
    mp4_boxes::Span,
    packet_table::{NeededGroup, PacketTable},
};

/// A larger packet is not worth holding: 4K pictures have a few megabytes.
const MAX_PACKET_BYTES: usize = 32 << 20;
/// NAL units looked at for one video: half an hour of four slices a picture, and half a second's work.
const MAX_UNITS: usize = 1_000_000;
/// Bytes of a `VisualSampleEntry` before the boxes in it (ISO/IEC 14496-12, 12.1.3).
const SAMPLE_ENTRY_BYTES: u64 = 78;

/// What a decoder is to read.
#[derive(Debug)]
pub struct Feed {
    file: File,
    /// The Matroska stream up to its first cluster.
    head: Vec<u8>,
    packets: Vec<FedPacket>,
    /// Times of the wanted frames, ascending; the decoder gives the frames 0, 1, 2, … up to the last of them.
    pub wanted: Vec<usize>,
}

#[derive(Debug)]
struct FedPacket {
    place: (u64, usize),
    time: usize,
    key: bool,
}

impl Feed {
    /// The packets for the frames at display indices `wanted` (ascending, distinct), if this file can be fed. Reads the
    /// file's header and the first bytes of each slice: blocks.
    pub fn plan(file: File, table: &PacketTable, wanted: &[usize]) -> Option<Feed> {
        let track = Track::find(&file)?;
        let head = track.matroska_head();
        let mut units = UnitReader { file: &file, length_bytes: track.length_bytes, units_left: MAX_UNITS };
        let (mut packets, mut wanted_times) = (Vec::new(), Vec::new());
        for group in table.needed_groups(wanted)? {
            let (fed, times) = needed_packets(&mut units, &group, packets.len())?;
            packets.extend(fed);
            wanted_times.extend(times);
        }
        Some(Feed { file, head, packets, wanted: wanted_times })
    }

    /// Packets fed.
    pub fn num_packets(&self) -> usize {
        self.packets.len()
    }

    /// Gives a decoder its stream, as fast as it reads. One that wants no more of it, or has ended, is no error here.
    ///
    /// # Errors
    /// When the pipe fails otherwise.
    pub async fn give_to(self: Arc<Self>, mut stdin: ChildStdin) -> Result<(), MediaError> {
        let (sender, mut pieces) = mpsc::channel(2);
        let reading = spawn_blocking(move || self.read(|piece| sender.blocking_send(piece).is_ok()));
        while let Some(piece) = pieces.recv().await {
            match stdin.write_all(&piece).await {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
                Err(error) => return Err(pipe_failed(&error)),
            }
        }
        drop((pieces, stdin));
        let read = reading.await.expect("reading packets does not panic: this is a bug");
        // A file that became shorter: the decoder sees its end too early, and its frames are then too few.
        read.or_else(|error| {
            tracing::warn!(%error, "a video file could not be read");
            Ok(())
        })
    }

    /// The stream in pieces, until `take` wants no more of them. Blocks.
    fn read(&self, mut take: impl FnMut(Vec<u8>) -> bool) -> io::Result<()> {
        let mut piece = self.head.clone();
        for packet in &self.packets {
            let mut block = vec![0x81, 0, 0, if packet.key { 0x80 } else { 0 }];
            let (header, (position, len)) = (block.len(), packet.place);
            block.resize(header + len, 0);
            self.file.read_exact_at(&mut block[header..], position)?;
            let time = element(&[0xe7], &(packet.time as u64).to_be_bytes());
            piece.extend(element(&[0x1f, 0x43, 0xb6, 0x75], &[time, element(&[0xa3], &block)].concat()));
            if !take(std::mem::take(&mut piece)) {
                break;
            }
        }
        Ok(())
    }
}

/// What of a group must be fed, and the times of its wanted frames, if its first frame comes out at `first_time`.
fn needed_packets(
    units: &mut UnitReader<'_>,
    group: &NeededGroup<'_>,
    first_time: usize,
) -> Option<(Vec<FedPacket>, Vec<usize>)> {
    let mut needed = Vec::new();
    for (index, packet) in group.packets.iter().enumerate() {
        let (place, pts) = (packet.place?, packet.pts?);
        let pictures = units.pictures(place)?;
        if index == 0 && !pictures.all_idr {
            return None;
        }
        if index == 0 || pictures.referred_to || group.wanted.contains(&pts) {
            needed.push((pts, place));
        }
    }
    let mut order: Vec<i64> = needed.iter().map(|&(pts, _)| pts).collect();
    let first = order[0];
    order.sort_unstable();
    // Two frames of one time, or one shown before the picture that all begins with, make the ranks doubtful.
    if order[0] != first || order.windows(2).any(|pair| pair[0] == pair[1]) {
        return None;
    }
    let time = |pts| order.binary_search(pts).ok().map(|rank| first_time + rank);
    let fed = needed
        .iter()
        .map(|(pts, place)| Some(FedPacket { place: *place, time: time(pts)?, key: *pts == first }));
    Some((fed.collect::<Option<_>>()?, group.wanted.iter().map(time).collect::<Option<_>>()?))
}

/// What the slices of a packet say of its pictures.
#[derive(Debug, PartialEq)]
struct Pictures {
    all_idr: bool,
    /// Whether other pictures may be predicted from these.
    referred_to: bool,
}

/// Looks into packets.
struct UnitReader<'a> {
    file: &'a File,
    /// Bytes of the length before each NAL unit.
    length_bytes: usize,
    units_left: usize,
}

impl UnitReader<'_> {
    /// Reads the first byte of every NAL unit; none if their lengths are not those of the packet, or there is no slice.
    fn pictures(&mut self, (position, len): (u64, usize)) -> Option<Pictures> {
        let (mut at, end) = (position, position.checked_add(len as u64)?);
        let mut pictures = Pictures { all_idr: true, referred_to: false };
        let mut slices = 0;
        while at < end {
            self.units_left = self.units_left.checked_sub(1)?;
            let mut head = [0; 5];
            let head = &mut head[..self.length_bytes + 1];
            self.file.read_exact_at(head, at).ok()?;
            let (unit, length) = head.split_last()?;
            let unit_bytes = length.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
            if unit_bytes == 0 {
                return None;
            }
            // H.264, 7.3.1: forbidden_zero_bit, nal_ref_idc (2 bits), nal_unit_type (5 bits); 1 to 5 are slices.
            let (reference, kind) = (unit >> 5 & 3, unit & 31);
            if (1..=5).contains(&kind) {
                slices += 1;
                pictures.all_idr &= kind == 5;
                pictures.referred_to |= reference != 0;
            }
            at += self.length_bytes as u64 + unit_bytes;
        }
        (at == end && slices > 0 && len <= MAX_PACKET_BYTES).then_some(pictures)
    }
}

/// The one video track of an MP4 file, as far as a decoder must know it.
#[derive(Debug)]
struct Track {
    width: u16,
    height: u16,
    /// `AVCDecoderConfigurationRecord` (ISO/IEC 14496-15, 5.3.3.1).
    configuration: Vec<u8>,
    /// Bytes of the length before each NAL unit.
    length_bytes: usize,
    colour: Option<Colour>,
}

/// Code points of ISO/IEC 23091-2, which MP4 and Matroska share.
#[derive(Debug, Clone, Copy)]
struct Colour {
    primaries: u16,
    transfer: u16,
    matrix: u16,
    full_range: Option<bool>,
}

impl Track {
    /// None where there are several, or several descriptions of one, or it is not plain H.264.
    fn find(file: &File) -> Option<Self> {
        let mut videos = Span::whole(file)?.only(file, b"moov")?.video_media(file)?.into_iter();
        let (media, None) = (videos.next()?, videos.next()) else { return None };
        let table = media.only(file, b"minf")?.only(file, b"stbl")?;
        // Version, flags and the number of entries, which must be 1, come first.
        let descriptions = table.only(file, b"stsd")?;
        let (kind, entry) = descriptions.after(8)?.single(file)?;
        let inside = entry.after(SAMPLE_ENTRY_BYTES)?;
        let configuration = inside.only(file, b"avcC")?.read(file)?;
        let length_bytes = usize::from(configuration.get(4)? & 3) + 1;
        let size = Span { start: entry.start + 24, end: entry.start + 28 }.read(file)?;
        let [w1, w0, h1, h0] = size[..] else { return None };
        (&kind == b"avc1").then_some(Track {
            width: u16::from_be_bytes([w1, w0]),
            height: u16::from_be_bytes([h1, h0]),
            configuration,
            length_bytes,
            colour: Colour::find(file, &inside)?,
        })
    }

    fn matroska_head(&self) -> Vec<u8> {
        let number = |id: &[u8], value: u64| element(id, &value.to_be_bytes());
        let document = [
            element(&[0x42, 0x82], b"matroska"),
            number(&[0x42, 0x87], 4), // DocTypeVersion
            number(&[0x42, 0x85], 2), // DocTypeReadVersion
        ];
        let mut video = [number(&[0xb0], self.width.into()), number(&[0xba], self.height.into())].concat();
        if let Some(colour) = self.colour {
            video.extend(element(&[0x55, 0xb0], &colour.matroska()));
        }
        let track = [
            number(&[0xd7], 1),       // TrackNumber
            number(&[0x73, 0xc5], 1), // TrackUID
            number(&[0x83], 1),       // TrackType: video
            element(&[0x86], b"V_MPEG4/ISO/AVC"),
            element(&[0x63, 0xa2], &self.configuration),
            element(&[0xe0], &video),
        ];
        [
            element(&[0x1a, 0x45, 0xdf, 0xa3], &document.concat()),
            // A segment without a known end.
            vec![0x18, 0x53, 0x80, 0x67, 0x01, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            element(&[0x15, 0x49, 0xa9, 0x66], &number(&[0x2a, 0xd7, 0xb1], 1_000_000)),
            element(&[0x16, 0x54, 0xae, 0x6b], &element(&[0xae], &track.concat())),
        ]
        .concat()
    }
}

impl Colour {
    /// What the container says of the colours; the outer option is for what cannot be read.
    fn find(file: &File, entry: &Span) -> Option<Option<Self>> {
        for (_, colour) in entry.boxes(file)?.into_iter().filter(|(kind, _)| kind == b"colr") {
            let bytes = colour.read(file)?;
            let word = |at: usize| Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
            let full_range = match bytes.get(..4)? {
                b"nclx" => Some(bytes.get(10)? & 0x80 != 0),
                b"nclc" => None,
                // A colour profile: not used for decoding.
                _ => continue,
            };
            return Some(Some(Colour {
                primaries: word(4)?,
                transfer: word(6)?,
                matrix: word(8)?,
                full_range,
            }));
        }
        Some(None)
    }

    fn matroska(self) -> Vec<u8> {
        let number = |id: [u8; 2], value: u16| element(&id, &value.to_be_bytes());
        let mut all = [
            number([0x55, 0xb1], self.matrix),
            number([0x55, 0xba], self.transfer),
            number([0x55, 0xbb], self.primaries),
        ]
        .concat();
        if let Some(full) = self.full_range {
            all.extend(number([0x55, 0xb9], if full { 2 } else { 1 }));
        }
        all
    }
}

/// An EBML element (RFC 8794): its id, its length in eight bytes, what is in it.
fn element(id: &[u8], content: &[u8]) -> Vec<u8> {
    let len = (content.len() as u64 | 1 << 56).to_be_bytes();
    [id, &len, content].concat()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::{super::packet_table::Packet, *};

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn unit(head: u8, len: u32) -> Vec<u8> {
        let mut unit = len.to_be_bytes().to_vec();
        unit.push(head);
        unit.resize(4 + len as usize, 0xaa);
        unit
    }

    #[test]
    fn a_packet_is_needed_if_any_of_its_slices_is_referred_to() {
        let pictures = |units: &[Vec<u8>]| {
            let bytes = units.concat();
            let file = file(&bytes);
            UnitReader { file: &file, length_bytes: 4, units_left: 2 }.pictures((0, bytes.len()))
        };
        let found = |all_idr, referred_to| Some(Pictures { all_idr, referred_to });
        // Parameter sets (0x67) are no slices; 0x65 is a slice of an IDR picture, 0x41 of one referred to.
        assert_eq!(pictures(&[unit(0x67, 9), unit(0x65, 40)]), found(true, true));
        assert_eq!(
            pictures(&[unit(0x67, 9), unit(0x68, 5), unit(0x65, 40)]),
            None,
            "more units than are looked at"
        );
        assert_eq!(pictures(&[unit(0x01, 40), unit(0x01, 30)]), found(false, false));
        assert_eq!(pictures(&[unit(0x01, 40), unit(0x41, 30)]), found(false, true));
        assert_eq!(pictures(&[unit(0x65, 40), unit(0x41, 30)]), found(false, true));
        assert_eq!(pictures(&[unit(0x67, 9)]), None);
        assert_eq!(pictures(&[unit(0x65, 40), vec![0, 0, 0, 0]]), None);
        assert_eq!(pictures(&[unit(0x65, 40), vec![0, 0, 0, 9, 0x41]]), None);
    }

    #[test]
    fn a_group_is_fed_from_its_idr_picture_on_without_what_nothing_refers_to() {
        // In decoding order: 0, 3, 1, 2, of which 3 is referred to.
        let fed = |first: u8, wanted: &[i64]| {
            let units = [unit(first, 10), unit(0x41, 10), unit(0x01, 10), unit(0x01, 10)];
            let packet = |(index, pts): (usize, i64)| Packet {
                pts: Some(pts),
                place: Some((index as u64 * 14, 14)),
                ..Packet::default()
            };
            let packets: Vec<Packet> = [0, 3, 1, 2].into_iter().enumerate().map(packet).collect();
            let file = file(&units.concat());
            let mut units = UnitReader { file: &file, length_bytes: 4, units_left: 9 };
            let group = NeededGroup { packets: &packets, wanted: wanted.to_vec() };
            let (fed, wanted) = needed_packets(&mut units, &group, 100)?;
            Some((fed.iter().map(|packet| (packet.place.0, packet.time)).collect::<Vec<_>>(), wanted))
        };
        assert_eq!(fed(0x65, &[2]), Some((vec![(0, 100), (14, 102), (42, 101)], vec![101])));
        assert_eq!(fed(0x65, &[0, 3]), Some((vec![(0, 100), (14, 101)], vec![100, 101])));
        assert_eq!(fed(0x41, &[2]), None, "begins with no IDR picture");
        assert_eq!(fed(0x05, &[2]).unwrap().0[0], (0, 100), "one that claims that nothing refers to it");
    }

    fn mp4_box(kind: &[u8; 4], content: &[u8]) -> Vec<u8> {
        [&(content.len() as u32 + 8).to_be_bytes()[..], kind, content].concat()
    }

    fn track(handler: &[u8; 4], entry_kind: &[u8; 4], boxes: &[Vec<u8>]) -> Vec<u8> {
        let mut entry = vec![0; SAMPLE_ENTRY_BYTES as usize];
        entry[24..28].copy_from_slice(&[5, 0, 2, 208]);
        entry.extend(boxes.concat());
        let descriptions = [&[0, 0, 0, 0, 0, 0, 0, 1], &mp4_box(entry_kind, &entry)[..]].concat();
        let table = mp4_box(b"stbl", &mp4_box(b"stsd", &descriptions));
        let handler = mp4_box(b"hdlr", &[&[0; 8], &handler[..], &[0; 13]].concat());
        mp4_box(b"trak", &mp4_box(b"mdia", &[handler, mp4_box(b"minf", &table)].concat()))
    }

    #[test]
    fn the_video_track_is_found_among_others() {
        let configuration = mp4_box(b"avcC", &[1, 100, 0, 31, 0xff, 0xe1]);
        let colour = mp4_box(b"colr", &[b"nclx", &[0, 9, 0, 16, 0, 9, 0x80][..]].concat());
        let video = track(b"vide", b"avc1", &[colour, configuration.clone()]);
        let sound = track(b"soun", b"mp4a", &[]);
        let movie = |tracks: &[Vec<u8>]| {
            let bytes = [mp4_box(b"ftyp", b"isom"), mp4_box(b"moov", &tracks.concat())].concat();
            Track::find(&file(&bytes))
        };
        let found = movie(&[sound.clone(), video.clone()]).unwrap();
        assert_eq!((found.width, found.height, found.length_bytes), (1280, 720, 4));
        assert_eq!(found.configuration, [1, 100, 0, 31, 0xff, 0xe1]);
        let colour = found.colour.unwrap();
        assert_eq!((colour.primaries, colour.transfer, colour.matrix), (9, 16, 9));
        assert_eq!(colour.full_range, Some(true));
        assert!(movie(&[video.clone(), video]).is_none());
        assert!(movie(&[sound]).is_none());
        assert!(movie(&[track(b"vide", b"avc1", &[])]).is_none());
        assert!(movie(&[track(b"vide", b"encv", &[configuration])]).is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), length_bytes in 1usize..5, at in 0u64..400,
        ) {
            let movie = file(&[mp4_box(b"ftyp", b"isom"), mp4_box(b"moov", &bytes)].concat());
            Track::find(&movie);
            Track::find(&file(&bytes));
            UnitReader { file: &movie, length_bytes, units_left: 400 }.pictures((at, bytes.len()));
        }
    }
}
