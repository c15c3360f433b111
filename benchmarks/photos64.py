"""Unpack the public corpus of `photos64` into folders named by their classes: 15,000 photographs of Tiny ImageNet.

The zips hold `<wnid>/<file>`, 75 images of each of 200 classes. Their licence is that of ImageNet (research only), so neither
they nor a base made of them lies in this repository.

    python benchmarks/photos64.py tiny_imagenet_public --out runs/photos
    warmfed pretrain benchmarks/photos64.toml --set data.path=runs/photos --out runs/photos64 --work runs/photos64-work
"""

import argparse
import sys
import zipfile
from pathlib import Path

NAMES = """
goldfish european_fire_salamander bullfrog tailed_frog american_alligator boa_constrictor trilobite scorpion black_widow
tarantula centipede goose koala jellyfish brain_coral snail slug sea_slug american_lobster spiny_lobster black_stork
king_penguin albatross dugong chihuahua yorkshire_terrier golden_retriever labrador_retriever german_shepherd
standard_poodle tabby_cat persian_cat egyptian_cat cougar lion brown_bear ladybug housefly bee grasshopper stick_insect
cockroach mantis dragonfly monarch_butterfly sulphur_butterfly sea_cucumber guinea_pig pig ox bison bighorn_sheep
gazelle arabian_camel orangutan chimpanzee baboon african_elephant red_panda abacus academic_gown altar apron backpack
banister barbershop barn barrel basketball bathtub station_wagon lighthouse beaker beer_bottle bikini binoculars
birdhouse bow_tie brass_plaque broom bucket bullet_train butcher_shop candle cannon cardigan cash_machine cd_player
chain treasure_chest christmas_stocking cliff_dwelling computer_keyboard confectionery convertible construction_crane
dam desk dining_table drumstick dumbbell flagpole fountain freight_car frying_pan fur_coat gasmask go_kart gondola
hourglass ipod rickshaw kimono lampshade lawn_mower lifeboat limousine magnetic_compass maypole military_uniform
miniskirt moving_van metal_nail neck_brace obelisk oboe pipe_organ parking_meter pay_phone picket_fence pill_bottle
plunger pole police_van poncho soda_bottle potters_wheel projectile punching_bag fishing_reel refrigerator
remote_control rocking_chair rugby_ball sandal school_bus scoreboard sewing_machine snorkel sock sombrero space_heater
spider_web sports_car steel_arch_bridge stopwatch sunglasses suspension_bridge swimming_trunks syringe teapot teddy_bear
thatched_roof torch tractor triumphal_arch trolleybus turnstile umbrella priest_vestment viaduct volleyball water_jug
water_tower wok wooden_spoon comic_book plate_of_food guacamole ice_cream popsicle pretzel mashed_potato cauliflower
bell_pepper mushroom orange_fruit lemon banana pomegranate meat_loaf pizza potpie espresso mountain cliff coral_reef
lakeside seashore acorn
"""
"""A name for each class, in the order of the wnids: WordNet's, in the words of captions where its own mean something else."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of the zips")
    parser.add_argument("--out", type=Path, required=True, help="new folder, a subfolder for each class")
    asked = parser.parse_args()
    classes = NAMES.split()
    zips = sorted(asked.source.glob("*.zip"))
    wnids = sorted({name.split("/")[0] for path in zips for name in zipfile.ZipFile(path).namelist()})
    if len(wnids) != len(classes) or asked.out.exists():
        sys.exit(f"{len(classes)} classes in {asked.source}/*.zip and no {asked.out} were expected; {len(wnids)} were found")
    name = dict(zip(wnids, classes, strict=True))
    for path in zips:
        with zipfile.ZipFile(path) as held:
            for member in held.namelist():
                wnid, _, file = member.partition("/")
                if file:
                    target = asked.out / name[wnid] / Path(file).name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(held.read(member))
    print(asked.out)


if __name__ == "__main__":
    main()
