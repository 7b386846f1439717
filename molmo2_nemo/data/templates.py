"""User messages: this project's own wordings of every task. One is drawn for each training example.

Fields in braces are those of wordings.py, which also has the published wordings. The wordings for videos are those
for images with the word for an image replaced. OWN names the lists.
"""

from __future__ import annotations

LONG_CAPTION = (
    "Describe this image.",
    "Describe this image in detail.",
    "Give a detailed description of this picture.",
    "Write a long caption for this photo.",
    "What is in this image? Answer at length.",
    "Tell me everything you can see in this picture.",
    "Please describe the photo thoroughly.",
    "Write a long and exact description of the image.",
    "Describe all that this image shows, from the main things to the small ones.",
    "I cannot see this picture. Describe it to me in full.",
    "Produce a dense caption of this image.",
    "What does the picture show? Leave nothing out.",
    "describe the image in great detail",
    "Could you walk me through this photo in detail?",
    "Explain what one sees in this image, including colors, positions and text.",
    "Write several sentences that describe this picture.",
    "Detailed caption please.",
    "Describe the scene in this image as fully as possible.",
    "Give me an in-depth caption for the image.",
    "long description of this picture",
)
SHORT_CAPTION = (
    "Give a short caption for this image.",
    "Describe this picture in one sentence.",
    "Write a brief caption.",
    "Summarize this image in a few words.",
    "What does this photo show, in short?",
    "Caption this image briefly.",
    "short caption please",
    "In one line, what is this picture about?",
    "Sum up the image in a single sentence.",
    "A brief description of this photo, please.",
    "Describe the image shortly.",
)
SHORT_ANSWER = (
    "{question} Answer with a single word or phrase.",
    "{question} Answer briefly.",
    "{question} Keep the answer short.",
    "{question}\nShort answer:",
    "{question} Reply in a few words.",
    "Answer this question about the image in a word or two: {question}",
    "Look at the image and give a short answer. {question}",
    "{question} Give just the answer.",
    "Question: {question} Short answer:",
    "{question} Respond with as few words as possible.",
    "Using the image, answer shortly: {question}",
    "{question} No explanation, only the answer.",
)
VIDEO_TRANSCRIPT = (
    "Describe this video as if you were speaking about it.",
    "Talk me through this video.",
    "Tell me out loud what happens in this video.",
    "Give a spoken-style account of the video.",
    "Narrate what you see in this video.",
)
POINTING = (
    "Point to {label}.",
    "Point to the {label}.",
    "Point at every {label} in the image.",
    "Point out all of the {label}.",
    "Find {label} and point to it.",
    "Find all the {label} in this picture.",
    "Where are the {label}?",
    "Where is the {label}? Point to it.",
    "Show me where the {label} can be seen.",
    "Locate {label} in the photo.",
    "Locate every {label}.",
    "Mark the {label}.",
    "Mark each {label} with a point.",
    "Can you point at {label}?",
    "Can you show me the {label} in this image?",
    "Please point to each {label}.",
    "Give points for {label}.",
    "Give the position of every {label}.",
    "Highlight {label} with points.",
    "Which parts of the image show {label}? Point to them.",
    "point: {label}",
    "point to {label}",
    "If there are any {label}, point to them.",
    "Look for {label} and point at what you find.",
    "I am looking for {label}. Where in the picture?",
    "Use points to show {label}.",
)
POINT_COUNT = (
    "How many {label} are there?",
    "How many {label} are in the image?",
    "Count the {label}.",
    "Count the {label} in the image.",
    "Count {label} and point to each.",
    "Point to the {label} and count them.",
    "Point at each {label}, then give the total.",
    "What is the number of {label}?",
    "Give me the count of {label}.",
    "How many {label} can you see in this picture?",
    "Tell me how many {label} the photo shows.",
    "Find and count all {label}.",
    "how many {label}",
    "count {label}",
    "I need to know the number of {label} in this image.",
    "Please count every {label}.",
    "What is the total number of {label} shown?",
    "Determine how many {label} appear in the picture.",
    "Number of {label}?",
    "Show each {label} while counting them.",
)
COUNT_THEN_POINT = (
    "How many {label} are there? Give the number first, then point to them.",
    "State the number of {label}, then point at each.",
    "Count the {label} and afterwards show where they are.",
    "Say how many {label} there are and point them out.",
    "First the count, then the points: {label}.",
    "Give the total of {label} followed by their points.",
)
ONLY_COUNT = (
    "How many {label} are there? Only give the number.",
    "Count the {label}. Answer with a number only.",
    "Number of {label}, without pointing.",
    "Give just the count of {label}.",
    "How many {label}? Do not point.",
    "Return only the number of {label}.",
)
EXPLAIN = (
    "{question} Explain your reasoning, then give a short answer.",
    "{question} Think it through in writing before you answer briefly.",
    "{question}\nGive an explanation first and end with the short answer.",
    "Explain step by step and finish with a brief answer. {question}",
    "{question} Show how you get to the answer, then state it.",
)
MOTION_CAPTION = (
    "Describe the motion in this video.",
    "What moves in this video, and how?",
    "Describe how things move in the clip.",
    "Tell me about the movements in the video.",
    "Caption the actions and movements of this video.",
    "How do the people and things in the video move?",
)
OBJECT_CAPTION = (
    "Describe the {object} in this video.",
    "What does the {object} look like, and what does the {object} do?",
    "Tell me about the {object} in one or two sentences.",
    "Caption the {object} of this video.",
    "Give a short description of the {object} one sees in the clip.",
    "Watch the {object} in the video and say briefly what happens to it.",
)
CLIP_CAPTION = (
    "Describe the video from {start} to {end}.",
    "What happens between {start} and {end}?",
    "Describe what one sees from {start} until {end}.",
    "Caption the part of the video from {start} to {end}.",
    "Tell me what goes on between {start} and {end} in the video.",
    "Write a caption for the segment {start} - {end}.",
    "From {start} to {end}, what does the video show?",
    "Summarize the section starting at {start} and ending at {end}.",
)
CLIP_TRANSCRIPT = (
    "Talk me through the video from {start} to {end}.",
    "Narrate what happens between {start} and {end}.",
    "Give a spoken-style account of the part from {start} to {end}.",
    "Tell me out loud what the video shows from {start} until {end}.",
)
FRAME_CAPTION = (
    "Describe the video at {time}.",
    "What does the frame at {time} show?",
    "Describe what one sees at {time}.",
    "Caption the moment {time} of the video.",
    "What is in the picture at {time}?",
    "Tell me what is visible at {time}.",
)
MULTI_POINT = (
    "Point to {label} in {images}.",
    "Point to the {label} in {images}.",
    "Find {label} in {images} and point.",
    "Where in {images} are the {label}?",
    "Show me {label} in {images}.",
    "Mark every {label} that appears in {images}.",
    "Looking at {images}, point to {label}.",
)
MULTI_POINT_COUNT = (
    "Point to and count the {label} in {images}.",
    "How many {label} are in {images}? Point to them.",
    "Count the {label} in {images}, pointing at each.",
    "Point at each {label} in {images}, then give the total.",
    "What is the number of {label} in {images}? Show them.",
)
MULTI_COUNT = (
    "How many {label} are in {images}? Only give the number.",
    "Count the {label} in {images} without pointing.",
    "Give just the count of {label} in {images}.",
    "Number of {label} in {images}?",
)
MULTI_COUNT_POINT = (
    "How many {label} are in {images}? Number first, then points.",
    "State how many {label} {images} show, then point at them.",
    "Give the total of {label} in {images} followed by their points.",
    "Say the number of {label} in {images} and then show each.",
)
TRACK = (
    "Track {label} at {fps} fps.",
    "Track the {label} through the video, {fps} frames per second.",
    "Follow {label} in the video at {fps} fps.",
    "Give the position of {label} over time at {fps} fps.",
    "Point to {label} in every frame, sampled at {fps} fps.",
    "At {fps} frames per second, track all {label}.",
    "Show where {label} is during the video at {fps} fps.",
)
TRACK_NO_FPS = (
    "Track {label}.",
    "Track the {label} through the video.",
    "Follow {label} in the video.",
    "Give the position of {label} over time.",
    "Keep pointing at {label} during the video.",
    "Show where {label} is all through the video.",
)
GROUND = (
    "Point to {label} when first and last seen.",
    "Where does {label} appear first, and where last?",
    "Give the first and the last position of {label}.",
    "Mark the start and end point of {label} in the video.",
    "At what times and places is {label} seen first and last?",
)
SINGLE_TRACK = (
    "Track the object at {point} at {fps} fps.",
    "Follow what is marked by {point}, {fps} frames per second.",
    "Starting from {point}, track this object at {fps} fps.",
    "This is the starting point: {point}. Track it at {fps} fps.",
    "Given {point}, where does it go? Answer at {fps} fps.",
    "Track {point} through the rest of the video at {fps} fps.",
)
SINGLE_END = (
    "Where is the object at {point} seen last?",
    "Starting from {point}, give only the last position of this object.",
    "The object starts at {point}. Where does it end?",
    "Given {point}, point to where it is at the end.",
    "Track {point}, but answer with its last position alone.",
    "First seen: {point}. Last seen?",
)
# Put before a question that asks for a number, where the answer has no points.
NO_POINTING = (
    "Do not point. ",
    "Please do not point. ",
    "Don't point at anything. ",
    "No points, please. ",
    "No points: ",
    "no points\n",
    "NO POINTS\n",
    "Without points: ",
    "Without pointing: ",
    "without pointing\n\n",
    "Text only. ",
    "Text only, no points:\n",
    "Answer in words only. ",
    "Answer in plain text, without points. ",
    "I need no points here. ",
    "Skip the points. ",
    "Leave out any points. ",
    "Your answer must not contain points. ",
    "There is no need to point. ",
    "Points are not wanted. ",
    "Just the answer, no points:\n",
    "Give a text answer and no points. ",
    "dont point. ",
    "Never mind pointing. ",
)

# Questions about the labels and antonyms of published data sets. They are drawn when shards are prepared; imported ones
# take their place when an example is built.
ACTION_QUESTIONS = (
    "Which action can be seen?",
    "What is going on in the video, in a few words?",
    "Name the activity that the video shows.",
)
PERSON_QUESTIONS = (*ACTION_QUESTIONS, "What does the person do?")
PAXION_QUESTIONS = (
    "Which of these descriptions fits what happens in the video?",
    "What does the person in the video do?",
    "What activity can be seen?",
)
NOT_SURE = "Not sure"  # the third option of Paxion's questions, by which they are told


def for_video(templates: tuple[str, ...]) -> tuple[str, ...]:
    """The wordings with "image", "picture" and "photo" replaced by "video"."""
    exchanged = []
    for text in templates:
        for word in ("image", "picture", "photo"):
            text = text.replace(word, "video")
        exchanged.append(text)
    return tuple(exchanged)


VIDEO_LONG_CAPTION = for_video(LONG_CAPTION)
VIDEO_SHORT_CAPTION = for_video(SHORT_CAPTION)
VIDEO_SHORT_ANSWER = for_video(SHORT_ANSWER)
VIDEO_POINT = for_video(POINTING)
VIDEO_POINT_COUNT = for_video(POINT_COUNT)
VIDEO_COUNT_POINT = for_video(COUNT_THEN_POINT)
VIDEO_ONLY_COUNT = for_video(ONLY_COUNT)

# The lists by the names that styles use for them; the fields that each may have are in wordings.py.
OWN: dict[str, tuple[str, ...]] = {
    "long_caption": LONG_CAPTION,
    "short_caption": SHORT_CAPTION,
    "video_long_caption": VIDEO_LONG_CAPTION,
    "video_short_caption": VIDEO_SHORT_CAPTION,
    "video_transcript": VIDEO_TRANSCRIPT,
    "video_motion_caption": MOTION_CAPTION,
    "video_object_caption": OBJECT_CAPTION,
    "video_clip_caption_start_end": CLIP_CAPTION,
    "video_clip_caption_start_end_in_seconds": CLIP_CAPTION,
    "video_clip_transcript_start_end": CLIP_TRANSCRIPT,
    "video_clip_transcript_start_end_in_seconds": CLIP_TRANSCRIPT,
    "video_frame_caption_timestamp": FRAME_CAPTION,
    "video_frame_caption_timestamp_in_seconds": FRAME_CAPTION,
    "video_short_answer": VIDEO_SHORT_ANSWER,
    "explanation": EXPLAIN,
    "pointing": POINTING,
    "point_count": POINT_COUNT,
    "count_then_point": COUNT_THEN_POINT,
    "only_count": ONLY_COUNT,
    "video_point": VIDEO_POINT,
    "video_point_count": VIDEO_POINT_COUNT,
    "video_count_point": VIDEO_COUNT_POINT,
    "video_count": VIDEO_ONLY_COUNT,
    "multi_image_pointing": MULTI_POINT,
    "multi_image_point_then_count": MULTI_POINT_COUNT,
    "multi_image_count_then_point": MULTI_COUNT_POINT,
    "multi_image_counting": MULTI_COUNT,
    "video_point_track_per_frame": TRACK,
    "video_point_track_per_frame_default_fps": TRACK_NO_FPS,
    "video_point_ground_start_end": GROUND,
    "video_single_point_track_per_frame": SINGLE_TRACK,
    "video_single_point_track_start_end": SINGLE_END,
    "no_pointing": NO_POINTING,
    **dict.fromkeys(("activitynet_label", "coin_label", "epic_kitchens_label"), ACTION_QUESTIONS),
    **dict.fromkeys(("moments_in_time_label", "youcook2_label"), ACTION_QUESTIONS),
    **dict.fromkeys(("kinetics_label", "charades_sta"), PERSON_QUESTIONS),
    "paxion": PAXION_QUESTIONS,
}
