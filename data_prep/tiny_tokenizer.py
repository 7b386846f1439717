"""Make the tiny tokenizer that ships with the package: byte-level BPE with exactly 1,024 entries.

    python data_prep/tiny_tokenizer.py [output folder]

It is trained on the texts in this file, which resemble the prompts, captions and point tags of the demo. The result
depends on nothing else, so every run writes the same bytes. The vocabulary is fixed once checkpoints exist; changing
the texts changes every id, so do it only together with new checkpoints.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from molmo2_nemo.errors import UserError

ENTRIES = 1024  # base embedding rows of the `tiny` preset
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Words with their leading space or sign, single digits, runs of punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CAPTIONS = """
A portrait of an astronaut in an orange space suit, smiling at the camera. Behind her there is a flag and a model of a
space
shuttle. The woman has short dark hair and a round white collar ring; her helmet rests in front of her.
A cup of coffee with white foam stands on a saucer with a spoon on a wooden table. The picture was taken from above.
A grey cat looks straight into the camera. Its eyes are green, its whiskers are long and white, and the background is
dark.
A close photograph of a pink and red flower with many petals, in front of blurred green leaves.
A temple with a curved roof stands on a hill under a blue sky; people walk up the stone steps in front of it.
The roof of the old pavilion is decorated with painted wood in red, green and gold.
Several people ride bicycles along a street. A man with a helmet rides a bike next to a parked car, and trees stand at
the side.
A large white rabbit comes out of its burrow under a tree on a green meadow. In this animated film the rabbit
stretches,
looks around and smells a flower. A butterfly flies past. The film is bright and colourful, with soft grass and a
clear sky.
A man talks to the camera while sitting in a moving car; houses and trees pass behind the window.
A rocket stands on the launch pad. A camera on a tripod, a man in a coat, and a tall building in the distance.
Brown and grey coins lie in rows on a dark ground. A wall of red bricks. Clear water, grass and gravel in the sun.
A photograph of a woman in uniform in front of a flag. A page of printed text with lines of letters. A picture of the
moon.
A horse in black on white. A retina seen through a microscope, round and orange. Cells in blue and pink from a
microscope.
The image shows a yellow square on the left, a blue circle on the right, and a green triangle at the top.
There are two red cars, three birds, a dog, a ball, a boat, a house and a bus at the bottom of the image.
The video shows a small animal that runs from left to right, then stops and looks back at the viewer.
At the start of the clip the scene is dark; at the end it is bright. The camera moves slowly to the right and zooms
in.
"""

PROMPTS = """
user
assistant
long_caption 65: long_caption: short_caption: video_long_caption: video_short_caption: user_qa: vqa2: a_okvqa_mc:
text_sft:
pointing: point_count: video_point: video_point_count: video_point_track_per_frame: multi_image_pointing: transcript:
demo:
Describe this image. Describe this image in detail. Describe the picture in one sentence. Write a long description of
the photo.
What is shown in this picture? What do you see in the image? Give a short caption for this video. Tell me what happens
in this clip.
Describe the video in detail, from the start to the end. Write a caption of this video. Summarize the video in a few
words.
Point to the cars. Point at every person. Point to all of the birds in the image. Find the flower and point to it.
Where are the bicycles? Show me where the cat is. Mark each coin in the picture. Locate all eyes in the photograph.
How many people are there? Count the rabbits. Count the windows in the image and point at each of them.
In the video, point to every moment when the rabbit appears. Track the rabbit through the video at 2 fps. Follow the
ball.
Point to the dog in all images. Point to the house in image_1, image_2. Which image shows the temple?
Answer the question with a single word or phrase. Only return the correct answer option. Choose one of the options
below.
Give the letter of the right answer. Which of the following is correct? Select the best answer from the list.
Question: What color is the flower? Answer: pink. Options: A. red B. green C. blue D. yellow E. white F. black
Please explain your reasoning and then give the final answer. What is the animal doing? What is the person holding?
Is there a cat in the picture? Yes, there is. No, there is not. Who is in the image? When was it taken? Why is the sky
dark?
Image 1 Image 2 Image 3 Image 4 Image 5 subtitle
0.0 - 0.4 hello 2.2 - 3.0 A quiet morning in the forest. 5.0 - 6.1 The rabbit wakes up. time 0.50 1.00 1.5 2.0
"""

ANSWERS = """
<points coords="1 1 031 625 2 156 104 3 1000 1000">red cars</points>
Counting the <points coords="1 1 100 200 2 500 500;3 3 999 000">dog</points> shows a total of 3.
<points coords="0.5 1 500 500;2.0 2 050 990 3 100 200;12.2 4 333 667">ball</points> There are 4
<tracks coords="0.0 1 156 208 2 469 208;0.5 1 172 208 2 078 208 3 009 010;1.0 2 062 208">people</tracks>
See <points alt="red car" coords="1 1 100 200">the car</points> and the other one. There are none. No tracks
available.
A. red B. a white rabbit C. the temple on the hill D. none of these. The answer is B. The correct option is C.
Counting the people shows a total of 12. There are 5 coins. It is a cup of coffee. The cat is looking at the camera.
The rabbit is big, white and friendly. The first picture shows a flower and the second one shows a temple.
"""

TEXTS = """
Language models read text as tokens, which are short pieces of words. A tokenizer learns which pieces are common.
Write a poem about the sea. Here is a short poem about the sea: The waves come in, the waves go out, and gulls fly
over all.
What is the capital of France? The capital of France is Paris. What is two plus two? Two plus two equals four.
Explain how a bicycle works. The rider turns the pedals, the chain turns the rear wheel, and the bicycle moves
forward.
How do I make coffee? Heat water, grind the beans, put the ground coffee into a filter and pour the hot water over it
slowly.
Name three animals that live in a forest. Deer, foxes and rabbits live in forests. Thank you! You are welcome.
It would be good to know what they think about this, because some people have never seen such things before.
We could go there after the first day, or stay at home and work; both would be fine with me. Let me know which you
like.
Between the city and the river there was once a small place where many families came together in summer.
"""


def corpus() -> list[str]:
    """Training lines; tags and prompts are included twice, as the demo mostly trains on them."""
    lines = [*CAPTIONS.splitlines(), *PROMPTS.splitlines(), *ANSWERS.splitlines(), *TEXTS.splitlines()]
    lines += PROMPTS.splitlines() + ANSWERS.splitlines()
    return [line + "\n" for line in lines if line]


def make() -> Tokenizer:
    """Train the tokenizer.

    Raises:
        UserError: the text is too short to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ENTRIES - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if tokenizer.get_vocab_size() != ENTRIES:
        raise UserError(f"the text gives {tokenizer.get_vocab_size()} entries, expected {ENTRIES}; add more text")
    return tokenizer


def write(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    make().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    default = Path(__file__).parent.parent / "molmo2_nemo" / "data" / "assets" / "tiny_tokenizer"
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
