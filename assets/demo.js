// The sketch pad of demo.py: black strokes on a canvas, sent as a data URL while they are drawn.
element.innerHTML = `<canvas width="${props.width}" height="${props.height}"></canvas>
    <label><input type="checkbox"> Eraser</label> <button>Clear</button>`;
const [canvas, eraser, clear] = element.querySelectorAll("canvas, input, button");
const pen = canvas.getContext("2d", {willReadFrequently: true});
const send = () => { props.value = canvas.toDataURL(); };
const draw = (event) => {
    const scale = canvas.width / canvas.clientWidth;
    const point = [event.offsetX * scale, event.offsetY * scale];
    if (event.type == "pointerdown") {
        canvas.setPointerCapture(event.pointerId);
        pen.beginPath();
        pen.moveTo(...point);
    }
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    pen.lineCap = "round";
    pen.lineWidth = props.line * (eraser.checked ? 6 : 1);
    pen.strokeStyle = eraser.checked ? "white" : "black";
    pen.lineTo(...point);
    pen.stroke();
    pen.beginPath();
    pen.moveTo(...point);
    send();
};
canvas.onpointerdown = draw;
canvas.onpointermove = draw;
clear.onclick = () => {
    pen.clearRect(0, 0, canvas.width, canvas.height);
    send();
};
const first = new Image();
first.onload = () => pen.drawImage(first, 0, 0);
first.src = props.value;
