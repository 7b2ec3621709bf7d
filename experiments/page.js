for (const slider of document.querySelectorAll(".slider")) {
  const steps = slider.dataset.steps.split(" "), input = slider.querySelector("input");
  input.hidden = steps.length < 2;
  input.addEventListener("input", () => {
    slider.querySelector("output").textContent = steps[input.value];
    for (const frames of slider.querySelectorAll(".frames"))
      frames.style.backgroundPositionY = (100 * input.value) / (steps.length - 1) + "%";
  });
}
