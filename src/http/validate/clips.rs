//! Joins consecutive pictures of a message to one video of these frames (a clip).
//!
//! Called by `messages.rs`. Clients that cannot send a video sample it themselves and send its
//! frames as pictures; each separate still image would cost as much as a video. Must never join a
//! part whose URL names a video or a GIF.

use super::{
    InvalidRequest,
    parts::{Part, VideoPart},
};
use crate::media::{Picture, VideoSource};

/// Longest caption between two frames of a clip.
const MAX_CAPTION_BYTES: usize = 64;

/// A part and its path, as in `messages[0].content[1]`.
pub type Placed = (String, Part);

/// Returns the parts of a message with consecutive pictures joined. A caption does not separate two
/// pictures: clients write a frame's number or time before the frame.
///
/// # Errors
/// More than `max_frames` consecutive pictures.
pub fn join(parts: Vec<Placed>, max_frames: usize) -> Result<Vec<Placed>, InvalidRequest> {
    let mut joined = Vec::with_capacity(parts.len());
    let mut run: Vec<(String, VideoPart)> = Vec::new();
    let mut has_caption = false;
    for (path, part) in parts {
        match part {
            Part::Video(picture) if is_picture(&picture) => {
                run.push((path, picture));
                has_caption = false;
            }
            Part::Text(text) if text.trim().is_empty() => joined.push((path, Part::Text(text))),
            Part::Text(text) => {
                if has_caption || !is_caption(&text) {
                    joined.extend(clip(&mut run, max_frames)?);
                }
                has_caption = true;
                joined.push((path, Part::Text(text)));
            }
            video @ Part::Video(_) => {
                joined.extend(clip(&mut run, max_frames)?);
                joined.push((path, video));
            }
        }
    }
    joined.extend(clip(&mut run, max_frames)?);
    Ok(joined)
}

/// Empties `run` and returns it as a still image or a clip, at the position of its first picture.
fn clip(run: &mut Vec<(String, VideoPart)>, max_frames: usize) -> Result<Option<Placed>, InvalidRequest> {
    let num_pictures = run.len();
    let mut pictures = std::mem::take(run).into_iter();
    let Some((path, mut first)) = pictures.next() else { return Ok(None) };
    if num_pictures > max_frames {
        let message = format!(
            "{num_pictures} pictures in a row are one video, which may have at most {max_frames} frames \
             (--max-frames); send fewer"
        );
        return Err(InvalidRequest::field(path, message));
    }
    if num_pictures > 1 {
        let mut frames = vec![frame(first.source.take(), first.uuid.take())];
        frames.extend(pictures.map(|(_, picture)| frame(picture.source, picture.uuid)));
        first.source = Some(list(frames));
        first.is_clip = true;
    }
    Ok(Some((path, Part::Video(first))))
}

/// Returns the frame that a picture's part sends or names.
fn frame(source: Option<VideoSource>, uuid: Option<String>) -> Picture {
    let url = match source {
        Some(VideoSource::Image(url)) => Some(url),
        _ => None,
    };
    Picture { url, uuid }
}

/// Returns the frames as plain URLs if none of them has a name.
fn list(frames: Vec<Picture>) -> VideoSource {
    if frames.iter().any(|frame| frame.uuid.is_some()) {
        return VideoSource::Pictures(frames);
    }
    VideoSource::Frames(frames.into_iter().filter_map(|frame| frame.url).collect())
}

/// Returns true for a picture that can be a frame: no video and no GIF that is sent as a picture.
fn is_picture(part: &VideoPart) -> bool {
    const OTHERS: [&str; 2] = ["data:video/", "data:image/gif"];
    let url = match &part.source {
        Some(VideoSource::Image(url)) => url,
        // A picture that was sent before, by its name alone.
        None => return part.uuid.is_some() && part.path.ends_with(".image_url"),
        Some(_) => return false,
    };
    let starts_with =
        |start: &&str| url.get(..start.len()).is_some_and(|own| own.eq_ignore_ascii_case(start));
    !OTHERS.iter().any(starts_with)
}

/// Returns true for a frame number or time: a short text with a digit that is no question.
fn is_caption(text: &str) -> bool {
    text.len() <= MAX_CAPTION_BYTES && text.bytes().any(|byte| byte.is_ascii_digit()) && !text.contains('?')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Placed {
        (String::new(), Part::Text(text.into()))
    }

    fn video(source: VideoSource) -> Placed {
        let part = VideoPart {
            path: String::new(),
            source_path: String::new(),
            source: Some(source),
            uuid: None,
            knobs: vec![],
            timestamps: None,
            is_clip: false,
        };
        (String::new(), Part::Video(part))
    }

    fn picture(url: &str) -> Placed {
        video(VideoSource::Image(url.into()))
    }

    /// Returns texts unchanged, still images and clips as their URLs, other videos as "video".
    fn joined(parts: Vec<Placed>) -> Vec<String> {
        let shown = |(_, part)| match part {
            Part::Text(text) => text,
            Part::Video(VideoPart { source: Some(VideoSource::Frames(urls)), is_clip: true, .. }) => {
                urls.join("+")
            }
            Part::Video(VideoPart { source: Some(VideoSource::Image(url)), is_clip: false, .. }) => url,
            Part::Video(_) => "video".into(),
        };
        join(parts, 4).unwrap().into_iter().map(shown).collect()
    }

    #[test]
    fn pictures_in_a_row_are_one_clip_in_the_place_of_the_first() {
        assert_eq!(joined(vec![picture("a")]), ["a"]);
        assert_eq!(joined(vec![text("x"), picture("a"), picture("b"), text("y")]), ["x", "a+b", "y"]);
        assert_eq!(joined(vec![picture("a"), text(" \n"), picture("b")]), [" \n", "a+b"]);
        let two = vec![picture("a"), picture("b"), text("and"), picture("c"), picture("d"), picture("e")];
        assert_eq!(joined(two), ["a+b", "and", "c+d+e"]);
    }

    #[test]
    fn captions_do_not_part_a_clip_but_sentences_do() {
        let captioned =
            vec![text("Frame 1:"), picture("a"), text("<2.0 seconds>"), picture("b"), text("What?")];
        assert_eq!(joined(captioned), ["Frame 1:", "<2.0 seconds>", "a+b", "What?"]);
        for between in [vec![text("Image B:")], vec![text("1"), text("2")], vec![text("Is it 1?")]] {
            let mut parts = vec![picture("a")];
            parts.extend(between);
            parts.push(picture("b"));
            let parts = joined(parts);
            assert!(
                parts.iter().any(|part| part == "a") && parts.iter().any(|part| part == "b"),
                "{parts:?}"
            );
        }
        let long = format!("7{}", "x".repeat(MAX_CAPTION_BYTES));
        assert_eq!(joined(vec![picture("a"), text(&long), picture("b")]).len(), 3);
    }

    #[test]
    fn videos_and_animations_are_no_frames() {
        let (mp4, gif) = ("data:video/mp4;base64,aa", "DATA:image/GIF;base64,aa");
        assert_eq!(joined(vec![picture(mp4), picture(mp4)]), [mp4, mp4]);
        assert_eq!(joined(vec![picture("a"), picture(gif), picture("b")]), ["a", gif, "b"]);
        let between = vec![picture("a"), picture("b"), video(VideoSource::Url("v".into())), picture("c")];
        assert_eq!(joined(between), ["a+b", "video", "c"]);
    }

    #[test]
    fn a_clip_has_a_limit() {
        let InvalidRequest::Field { message, .. } = join(vec![picture("a"), picture("b")], 1).unwrap_err()
        else {
            panic!("a field is at fault")
        };
        assert!(message.contains("2 pictures") && message.contains("at most 1 frames"), "{message}");
    }
}
