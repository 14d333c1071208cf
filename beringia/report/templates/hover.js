// The exact value under the pointer. The page reads the same without it: marks carry titles, and the data are tables below.
(() => {
  const tip = document.getElementById("tip");
  const show = (event, words) => {
    tip.textContent = words;
    tip.hidden = false;
    const right = event.clientX > window.innerWidth / 2;
    tip.style.top = `${event.clientY + 14}px`;
    tip.style.left = right ? "auto" : `${event.clientX + 12}px`;
    tip.style.right = right ? `${window.innerWidth - event.clientX + 12}px` : "auto";
  };
  for (const chart of document.querySelectorAll("svg[data-hover]")) {
    const points = JSON.parse(chart.dataset.hover);
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const scale = chart.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      let best = null, nearest = 30;
      for (const point of points) {
        const distance = Math.hypot(point[0] - x, (point[1] - y) / 3);
        if (distance < nearest) { nearest = distance; best = point; }
      }
      if (best) show(event, best[2]); else tip.hidden = true;
    });
    chart.addEventListener("pointerleave", () => { tip.hidden = true; });
  }
})();
